"""Studies: what a method is worth on real data, with intervals. Each is one command that can be cut off and repeated.

crossrep study gca DIR         gated cross-attention in a two-domain sequential recommender (docs/study-gca.md)
crossrep study upstreams DIR   the triple tower beside other click models (docs/study-upstream.md)
crossrep study retrieval DIR   which items a user will click, by UR and IR and what a stream adds (the same)

split.py        what is trained, validated and tested on, without leakage across ties of time; batches
recommender.py  the two-domain recommender, with gated cross-attention at chosen levels
ranking.py      NDCG and AUC over all items, and what they are with sampled negatives
intervals.py    95 % intervals over seeds
training.py     one run: train, stop early, test
gca.py          the arms, the tuning, the runs: a line of JSON each
gca_report.py   tables and plots from those lines

runs.py             finished runs, and the processes that do the others
metrics.py          AUC per user, beside what models/train.py has
tables.py           how tables and plots look
upstreams.py        the models, their trials, the runs; boosted_trees.py: one of them; upstreams_report.py
retrieval.py        the ways of scoring, their trials, the runs; retrieval_world.py: what is known each day; ranks.py; retrieval_report.py
"""
