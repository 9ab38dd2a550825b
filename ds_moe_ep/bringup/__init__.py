"""Bringing a job up in four phases: experts, communication, distribution of work, memory.

Each phase judges what was measured and says so; nothing here serves a prompt.
"""
