"""CORE's bundle (nanochat's eval_bundle, DCLM's v1 baselines): its address and its files' SHA-256."""

from __future__ import annotations

PUBLISHED_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
ZIP_SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
"""of that archive as public code states it; not verified, so a mismatch only warns"""

TASKS = {
    "commonsense_reasoning": {
        "commonsense_qa": "2771f63f8127c0725b1f6b0ef2cd2ef6469168ae5875fc8d276b25b4f32c8c1a",
        "copa": "595dca44dec54c849490bd403a3e24a29e3b944065783222ebb0eb1a55298846",
        "openbook_qa": "adb2e5c7f8db810ddad4d6b2bf53dcc86dcc545499f7aafcaf42a8e179476c09",
        "piqa": "d2870e73aec5154df3faf259b7700876e11608eebdf69e9d6667435673dbe4e0",
    },
    "language_understanding": {
        "bigbench_language_identification": "80c98d8e7ab8213513d1643886229c05c40a6837353b07c19ac7bd860668954e",
        "hellaswag": "52a31d32b14dff7713a705be664cbeff77eb66edcf7f8b0a5e9408633929b448",
        "lambada_openai": "411bfbe5b9054346b6a19299c0242670adbefb9162efd958593cbc0290b8c9dc",
        "winograd_wsc": "746336c27cd2e39a554cb1b8b4869d0f1ae2577ac5bfe799842d26bca5a5bf5e",
        "winogrande": "ea1592526f3bfdd0948ed3acb1b4dfa3f83d23698917118688ee1df7f8d4b8d7",
    },
    "reading_comprehension": {
        "boolq": "454ff101e614370bb1807fe7ebbda6fdb57e794b9662cc1ccae211bf1ff626c8",
        "coqa": "0c2b8029776a138f755d065b9506eb8e91bbd38c44dce321a75f9987bb7875aa",
        "squad": "41fe6c43e725c0dc9161465066932c46edc390bf4019c361c500bbc4b766a350",
    },
    "symbolic_problem_solving": {
        "agi_eval_lsat_ar": "9ffd73480b51746c11627e56239f8b87035eb255cb92c3a58fd64e2e4b65fb56",
        "bigbench_cs_algorithms": "8485683a8c7e7e6c9fc6ca3cc81140fd85edb27f34406a6736d1539cf7ebcb3a",
        "bigbench_dyck_languages": "106ba9ac7507c7ab385c5e59c49cd57aa83025abf080d9b2a2661c0d6c6dbcc5",
        "bigbench_operators": "41e2964ad619c49edd97c22b2c50f922a0241255d906a754bf81a20f4f66b85f",
        "bigbench_repeat_copy_logic": "8febd2c0080a15680cd17f92bfa30d87abcfac021e646e55d0b8ad69f0cfa767",
    },
    "world_knowledge": {
        "arc_challenge": "1ae3aeedf1951d881cbd5c2e3a31e78a1993d251479afbe4cb413b6707244636",
        "arc_easy": "d2d12e59543acf9a5ef6079634a72b30215e36c2fd4236fff3bc855d287b87f5",
        "bigbench_qa_wikidata": "bb0d22727cb25beffb022c8e8c0c3e1159c8b3c7bd7284603c0d6491f8616265",
        "jeopardy_all": "187e7f270a440c63d6cf11a57459fdc7e0bce889338225e42cc88e24ee13d52e",
    },
}
"""SHA-256 of `eval_data/<folder>/<task>.jsonl`"""

CORE_SHA256 = {
    "core.yaml": "463f6ae0aa127fbd41fa655f8919e136858f4849eef176922a3be96e102ce7e7",
    "eval_meta_data.csv": "84e279cdc0d836c9ea3a6e55a99102f8ee18f72809fe7aa6ac5a1fe630aa492f",
} | {f"eval_data/{folder}/{task}.jsonl": digest for folder, tasks in TASKS.items() for task, digest in tasks.items()}
