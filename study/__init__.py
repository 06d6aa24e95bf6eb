"""Studies: what a method is worth on real data, with intervals. Each is one command that can be cut off and repeated.

crossrep study gca DIR        gated cross-attention in a two-domain sequential recommender (docs/study-gca.md)
crossrep study transfer DIR   what an upstream's representations bring to a click model (docs/study.md)

runs.py         runs in parallel, each a line of JSON: what is finished is not run again
intervals.py    95 % intervals over seeds
tables.py       tables in Markdown, plots in SVG

The first:

split.py        what is trained, validated and tested on, without leakage across ties of time; batches
recommender.py  the two-domain recommender, with gated cross-attention at chosen levels
ranking.py      NDCG and AUC over all items, and what they are with sampled negatives
training.py     one run: train, stop early, test
gca.py, gca_report.py

The second:

arms.py         what is compared, as data: begin here
worlds.py       upstreams, and what they give for every impression
past.py         what was known of a user or item before an impression
downstream.py   one run: train a click model with that, test
metrics.py      AUC, GAUC, logloss, by tab, of the cold
transfer.py, transfer_report.py
"""
