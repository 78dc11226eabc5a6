"""CORE of the GPT-2 family under our definition: all 22 tasks whole, baselines of the old edition. From the tables that
are published with the bundle."""

PUBLISHED_BUNDLE = "eval_bundle"
GPT2_CORE = {"GPT-2 124M": 0.1139, "GPT-2 355M": 0.1849, "GPT-2 774M": 0.2146, "GPT-2 1.6B": 0.256525}

# Centered accuracy, in the order of the models above.
TABLE = """
hellaswag_zeroshot                  0.0780   0.1867   0.2533   0.3360
jeopardy                            0.0019   0.0440   0.0450   0.0920
bigbench_qa_wikidata                0.2827   0.4280   0.4800   0.5310
arc_easy                            0.2166   0.3067   0.3800   0.4600
arc_challenge                      -0.0375   0.0160   0.0187   0.0653
copa                                0.2000   0.3200   0.3400   0.3400
commonsense_qa                      0.0305  -0.0050   0.0875   0.0338
piqa                                0.2459   0.3400   0.3960   0.4500
openbook_qa                         0.0373   0.0773   0.0907   0.1280
lambada_openai                      0.3229   0.4260   0.4880   0.5230
hellaswag                           0.0772   0.1933   0.2587   0.3493
winograd                            0.1575   0.3114   0.3773   0.4286
winogrande                         -0.0276   0.0420   0.0820   0.1380
bigbench_dyck_languages             0.1550   0.1700   0.2250   0.2470
agi_eval_lsat_ar                    0.0326   0.0380   0.0707   0.0924
bigbench_cs_algorithms              0.4197   0.4560   0.4400   0.4170
bigbench_operators                  0.0857   0.1000   0.1143   0.1571
bigbench_repeat_copy_logic          0.0312   0.0625   0.0625   0.0938
squad                               0.0583   0.1690   0.2350   0.3090
coqa                                0.1337   0.2270   0.2300   0.2800
boolq                              -0.1782  -0.0368  -0.1395  -0.0026
bigbench_language_identification    0.1822   0.1958   0.1870   0.1749
"""

# task -> model -> centered accuracy
GPT2_TASKS = {
    task: dict(zip(GPT2_CORE, map(float, values), strict=True))
    for task, *values in (line.split() for line in TABLE.strip().splitlines())
}
