"""Ratios against what a user would pick instead; both sides interleaved in one run on one core."""
