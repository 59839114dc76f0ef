"""What goes beyond the papers' method. Each file serves a flag or a name, and could be deleted with it.

shapes: the data set that is made on the fly (--dataset shapes). figures: all figures (--figures).
experts: experts cut out as static networks (--experts). baselines: the static networks of other papers, and
classic routes (their --variant, --route). published: the papers' numbers and checkpoints (--published).
"""
