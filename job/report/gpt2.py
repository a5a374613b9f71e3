"""GPT-2's published accuracies by CORE task, as they come with the bundle (openai-community-gpt2*.csv there).

124M was scored on all items, the larger three on at most 1,000 a task.
"""

from __future__ import annotations

from collections.abc import Mapping

from job.evaluation.ledger import centered_accuracy, metric_of

SIZES = ("124M", "355M", "774M", "1.6B")
ACCURACY = {
    "hellaswag_zeroshot": (0.308504, 0.39, 0.44, 0.502),
    "jeopardy": (0.001889, 0.044, 0.045, 0.092),
    "bigbench_qa_wikidata": (0.282663, 0.428, 0.48, 0.531),
    "arc_easy": (0.412458, 0.48, 0.535, 0.595),
    "arc_challenge": (0.221843, 0.262, 0.264, 0.299),
    "copa": (0.6, 0.66, 0.67, 0.67),
    "commonsense_qa": (0.224406, 0.196, 0.27, 0.227),
    "piqa": (0.62296, 0.67, 0.698, 0.725),
    "openbook_qa": (0.278, 0.308, 0.318, 0.346),
    "lambada_openai": (0.322919, 0.426, 0.488, 0.523),
    "hellaswag": (0.307907, 0.395, 0.444, 0.512),
    "winograd": (0.578755, 0.655678, 0.688645, 0.714286),
    "winogrande": (0.486188, 0.521, 0.541, 0.569),
    "bigbench_dyck_languages": (0.155, 0.17, 0.225, 0.247),
    "agi_eval_lsat_ar": (0.226087, 0.230435, 0.256522, 0.273913),
    "bigbench_cs_algorithms": (0.419697, 0.456, 0.44, 0.417),
    "bigbench_operators": (0.085714, 0.1, 0.114286, 0.157143),
    "bigbench_repeat_copy_logic": (0.03125, 0.0625, 0.0625, 0.09375),
    "squad": (0.058278, 0.169, 0.235, 0.309),
    "coqa": (0.133659, 0.227, 0.23, 0.28),
    "boolq": (0.552294, 0.606, 0.567, 0.619),
    "bigbench_language_identification": (0.2566, 0.269, 0.261, 0.25),
}
"""by task, in the order of SIZES"""


def centered(baselines: Mapping[str, float]) -> dict[str, tuple[float, ...]] | None:
    """Centred accuracies in the order of SIZES, by task and last of all by "CORE"; None for other tasks than CORE's.

    baselines: a guesser's accuracy, 0 to 1, by task.
    """
    if not baselines.keys() <= ACCURACY.keys():
        return None
    rows = {task: tuple(centered_accuracy(a, guess) for a in ACCURACY[task]) for task, guess in baselines.items()}
    return rows | {"CORE": tuple(metric_of(column) for column in zip(*rows.values(), strict=True))}
