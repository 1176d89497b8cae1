"""A metric of `evaluate`: next-token loss, perplexity and bits per byte of a checkpoint on texts.

    metric = evaluate.load(str(hf_tst.METRIC_FILE))
    metric.compute(predictions=["some text"], model_id="runs/quickstart")

`evaluate` copies this file before it imports it: so it has no relative imports.
"""

import datasets
import evaluate

from hf_tst.evaluation.scores import evaluate_checkpoint


class NextTokenMetric(evaluate.Metric):
    """Next-token loss (nats per token), perplexity and bits per byte of a causal language model on texts.

    Args:
        predictions (list of str): Texts to predict, each from its first token on.
        model_id (str): Folder or Hub id of the model and its tokenizer.
        max_length, batch_size, device, dtype, trust_remote_code: As for hf_tst.evaluate_checkpoint.

    Returns:
        dict: As hf_tst.evaluate_checkpoint.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=str(self.__doc__),
            citation="",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], model_id: str, **options: object) -> dict[str, object]:
        return evaluate_checkpoint(model_id, predictions, **options)  # type: ignore[arg-type]
