"""Facts of the leaderboard that several rooms need."""

from __future__ import annotations

UNTIMED_STEPS = 11
"""its clock leaves out steps 0-10 (compilation and warm-up)"""
GPT2_XL_CORE = 0.256525
"""CORE of GPT-2 XL (1.6 B parameters), published with the bundle (at most 1,000 items a task): the score to beat"""
