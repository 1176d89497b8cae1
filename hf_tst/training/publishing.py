"""What a Trainer sends to the Hub: its repository, the model and the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from ..records.card import write_card_of_trainer
from ..records.hub import check_repo_holds_no_other_model, explained_hub_errors


class PublishingTrainer(Trainer):
    """Trainer that says in one sentence what the Hub refuses, and writes a card from the record of the run.

    Overrides:
        - `init_hf_repo`, `push_to_hub`: errors of the Hub as one sentence, the earliest before training.
        - `create_model_card`: a card with the phases, from the record of the run.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository to push to, or find it; refuses one that holds another model.

        Raises:
            HubError: If the Hub refuses or does not answer.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with explained_hub_errors(f"Making the repository {name}", "Nothing was changed."):
            # It takes no `private` in the older Transformers.
            super().init_hf_repo(token, *([] if private is None else [private]))
            if self.is_world_process_zero():
                config = self.accelerator.unwrap_model(self.model).config
                check_repo_holds_no_other_model(
                    self.hub_model_id, config, token or self.args.hub_token, self.args.hub_revision
                )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the model, as [`~transformers.Trainer.push_to_hub`] does.

        Raises:
            HubError: If the Hub refuses or does not answer; the model is saved in `output_dir` then.
        """
        kept = f"The model is saved in {self.args.output_dir}."
        with explained_hub_errors(f"Pushing {self.args.output_dir}", kept):
            return super().push_to_hub(*args, **kwargs)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` in the output folder from the record of the run, with its loss curve.

        Arguments as for [`~transformers.Trainer.create_model_card`]; `tasks`, `dataset_tags` and `dataset_args` are for
        results that a card of this kind does not hold. A card that no trainer wrote is left as it is.
        """
        if self.is_world_process_zero():
            write_card_of_trainer(
                self,
                repo_id=self.hub_model_id or model_name,
                base_model=finetuned_from,
                datasets=dataset,
                language=language,
                license=license,
                tags=tags,
            )
