"""The rule sets that come with fxrewrite.

`conv_bn` folds batch norms into the convolutions before them. `affine` folds all that is a scale
and a shift per channel: `forward` into the layer before it, `backward` into the one behind it, and
`products` of two layers. `reparam` makes one layer of parallel branches, `cleanup` leaves out what
does nothing, and `inference` gathers these. `merge_siblings` makes one layer of several that read
one value.

They share their arithmetic, `affine`, `constants`, `geometry`, and what there is to know of other
modules: `norms` and `spellings`.
"""
