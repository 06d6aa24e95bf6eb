"""Studies: what a method is worth on real data, with intervals. Each is one command that can be cut off and repeated.

crossrep study transfer DIR    what an upstream's representations bring to a click model (docs/study.md)
crossrep study upstreams DIR   the triple tower beside other click models (docs/study-upstream.md)
crossrep study retrieval DIR   which items a user will click, by UR and IR and what a stream adds (the same)
crossrep study gca DIR         gated cross-attention in a two-domain sequential recommender (docs/study-gca.md)

runs.py         runs in parallel, each a line of JSON: what is finished is not run again
intervals.py    95 % intervals over seeds
tables.py       tables in Markdown, plots in SVG
metrics.py      AUC, GAUC, logloss, by tab, of the cold

transfer:

arms.py         what is compared, as data: begin here
worlds.py       upstreams, and what they give for every impression
past.py         what was known of a user or item before an impression
downstream.py   one run: train a click model with that, test
transfer.py, transfer_report.py

upstreams:

upstreams.py    the models, their trials, the runs; boosted_trees.py: one of them; upstreams_report.py

retrieval:

retrieval.py    the ways of scoring, their trials, the runs; retrieval_world.py: what is known each day; ranks.py; retrieval_report.py

gca:

split.py        what is trained, validated and tested on, without leakage across ties of time; batches
recommender.py  the two-domain recommender, with gated cross-attention at chosen levels
ranking.py      NDCG and AUC over all items, and what they are with sampled negatives
training.py     one run: train, stop early, test
gca.py, gca_report.py
"""
