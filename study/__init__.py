"""Studies: what a method is worth on real data, with intervals. Each is one command that can be cut off and repeated.

crossrep study gca DIR     gated cross-attention in a two-domain sequential recommender (docs/study-gca.md)

split.py        what is trained, validated and tested on, without leakage across ties of time; batches
recommender.py  the two-domain recommender, with gated cross-attention at chosen levels
ranking.py      NDCG and AUC over all items, and what they are with sampled negatives
intervals.py    95 % intervals over seeds
training.py     one run: train, stop early, test
gca.py          the arms, the tuning, the runs: a line of JSON each
gca_report.py   tables and plots from those lines
"""
