"""What a run can train for: one task a file."""

from train.tasks.base import Score, Task
from train.tasks.images import Classify
from train.tasks.text import ClassifyText, LanguageModel

TASKS: dict[str, Task] = {"classify": Classify(), "language_model": LanguageModel(), "classify_text": ClassifyText()}

__all__ = ["TASKS", "Score", "Task"]
