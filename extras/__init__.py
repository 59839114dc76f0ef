"""What goes beyond the papers' method. Each file serves a flag or a name, and could be deleted with it.

shapes: the data set that is made on the fly (--dataset shapes). figures: all figures, and pictures with what
is predicted (--figures, --image). experts: experts cut out as static networks (--experts). baselines: the
static networks of other papers, and classic routes (their --variant, --route). published: the papers' numbers
(--published), and checkpoints of Dynamic Routing (evaluate.py --variant, --init).
"""
