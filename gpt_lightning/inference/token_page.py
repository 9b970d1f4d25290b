"""A text coloured by the loss of each token, as HTML that loads nothing and needs no other file."""

from __future__ import annotations

import base64
import html
import json
import math

from torch import Tensor

from gpt_lightning.inference.inspection import Inspection

STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7 }
.token { background: rgb(229 72 58 / var(--heat)); border-radius: 2px; box-shadow: inset -1px 0 #8884 }
.token.prompt { color: color-mix(in srgb, currentColor 60%, transparent) }
.token:hover, .token:focus { outline: 1px solid }
.tip { display: none; position: fixed; right: 1rem; bottom: 1rem; z-index: 99; white-space: pre; margin: 0;
  font: 13px/1.4 ui-monospace, monospace; padding: .5rem .8rem; border: 1px solid #8888; border-radius: 4px;
  background: Canvas; color: CanvasText }
.token:hover .tip, .token:focus .tip { display: block }
.tokens:has(.token:hover) .token:focus:not(:hover) .tip { display: none }
"""
PAGE = """<!doctype html><!-- gpt_lightning tokens -->
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 50rem; padding: 0 1rem 12rem }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere }}
@media (max-height: 40rem) {{ body {{ margin: 0 auto }} h1, p {{ margin: .4rem 0 }} }}
.scale {{ display: inline-block; width: 8rem; height: .8rem; border: 1px solid #8888;
  background: linear-gradient(to right, rgb(229 72 58 / 0), rgb(229 72 58)) }}
canvas {{ width: min(100%, 30rem); image-rendering: pixelated; border: 1px solid #8888 }}
.attention .token {{ background: rgb(50 120 230 / var(--weight, 0)) }}
{style}</style></head><body>
<h1>{title}</h1>
<p>{facts}</p>
<p>0 <span class="scale"></span> {guess:.2f} nats, the loss of guessing.
Point at a token to see what the model expected there.</p>
{attention}
{tokens}
"""
# pointing at a token colours what the head reads there; each row of the picture is a token that reads
ATTENTION = """
<p><label><input type="checkbox" id="look"> Show the attention of layer {layer}, head {head} instead:
point at a token to see what it reads</label></p>
<details><summary>The attention of all tokens: a row for each, the first at the top</summary>
<canvas></canvas></details>
"""
SCRIPT = """<script type="application/json" id="weights">{data}</script>
<script>
const data = JSON.parse(document.getElementById("weights").textContent), size = data.size;
const weights = Uint8Array.from(atob(data.weights), c => c.charCodeAt(0));
const tokens = document.querySelectorAll(".token"), text = document.querySelector(".tokens");
document.getElementById("look").onchange = event => text.classList.toggle("attention", event.target.checked);
tokens.forEach((token, row) => token.onmouseenter = token.onfocus = () =>
  tokens.forEach((other, i) => other.style.setProperty("--weight", weights[row * size + i] / 255)));
const canvas = document.querySelector("canvas");
canvas.width = canvas.height = size;
const image = new ImageData(size, size);
weights.forEach((weight, i) => image.data.set([50, 120, 230, weight], 4 * i));
canvas.getContext("2d").putImageData(image, 0, 0);
</script>
"""


def tokens_html(seen: Inspection, *, prompt: int = 0) -> str:
    """The tokens, the first `prompt` of them set off; STYLE shows on hover what the model expected."""
    worst, parts = math.log(seen.n_vocab), []
    for i, (text, nats, expected) in enumerate(zip(seen.tokens, seen.nats, seen.expected, strict=True)):
        lines = ["the first token, which nothing precedes"]
        if nats is not None:
            lines = [f"{_shown(text)}  {math.exp(-nats):.1%}, loss {nats:.3f} nats", "expected:"]
            lines += [f"{probability:6.1%}  {_shown(token)}" for token, probability in expected]
        heat, kind = min(1.0, (nats or 0.0) / worst), "token prompt" if i < prompt else "token"
        visible = html.escape(text.replace("\n", "↵\n"))
        tip = f'<span class="tip">{html.escape(chr(10).join(lines))}</span>'
        parts.append(f'<span class="{kind}" tabindex="0" style="--heat: {heat:.3f}">{visible}{tip}</span>')
    return f'<div class="tokens">{"".join(parts)}</div>'


def token_page(
    seen: Inspection,
    title: str,
    *,
    total: int,
    prompt: int = 0,
    weights: Tensor | None = None,
    layer: int = 0,
    head: int = 0,
) -> str:
    """The whole page of the first tokens of `total`, with the attention of a head if there are weights.

    The first `prompt` tokens are set off.
    """
    losses = [nats for nats in seen.nats if nats is not None]
    facts = f"The first {len(seen.tokens):,} of {total:,} tokens, read at once. "
    facts += f"Their mean loss is {sum(losses) / len(losses):.4f} nats."
    page = PAGE.format(
        title=html.escape(title),
        facts=facts,
        guess=math.log(seen.n_vocab),
        style=STYLE,
        attention=ATTENTION.format(layer=layer, head=head) if weights is not None else "",
        tokens=tokens_html(seen, prompt=prompt),
    )
    if weights is None:
        return page
    shades = weights / weights.amax(1, keepdim=True) * 255  # of what a token reads most
    data = {"size": len(weights), "weights": base64.b64encode(shades.byte().numpy().tobytes()).decode()}
    return page + SCRIPT.replace("{data}", json.dumps(data))


def _shown(text: str) -> str:
    """A token in quotation marks, on one line."""
    return json.dumps(text, ensure_ascii=False)
