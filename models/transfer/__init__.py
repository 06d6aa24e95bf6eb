"""Ways to use an upstream model's representations in a click model: one small `nn.Module` each, independent of the model it is put into.

x is what the click model computes, [B, width]: its embedded features or a later layer. r is one row of representations per sample, [B, k],
the parts side by side (UR, IR, CR(u), CR(i), ...), as `crossrep.torch` or a training set delivers them; bring them to a common scale first.

    feature level   linear, concat, adapter      (x, r) -> [B, module.width], which takes x's place
    module level    isomorphic                   (x, r) -> [B, module.width], which is a part of the logit
    model level     retrieval, index             UR, IR -> a cosine; the nearest items of a user
    half-lives      half_lives                   (x, r) -> [B, module.width], which takes x's place
    attention       gated_cross_attention        (x, r) -> x'' of x's shape; also of sequences

`dcnv2.DCNv2` is a plain click model with a place for each of them. What is stated by whom is said in each file; the rest is our own choice.
"""
