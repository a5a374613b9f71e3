"""CORE: 22 in-context-learning tasks, their prompts, their scores, and every answer kept."""
