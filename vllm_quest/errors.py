"""What a user's wrong entry becomes: one sentence that names the field and what is allowed."""


class QuestConfigError(ValueError):
    """A wrong entry in ``additional_config['quest']``; names the field and what is allowed."""

    def __init__(self, field: str, problem: str, allowed: str) -> None:
        where = f"additional_config['quest'].{field}" if field else "additional_config['quest']"
        super().__init__(f"{where}: {problem}; allowed: {allowed}")
