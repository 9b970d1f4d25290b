"""Kills random runs at random moments, resumes them, and compares them with runs that nothing happened to."""
