r"""Self-expanding networks: start small, and add units or layers during training where the natural gradient wants them.

SENN: Mitchell, Menzenbach, Kersting, Mundt: "Self-expanding neural networks", 2023, arXiv:2307.04526.
SECNN: Appolinary, Deaconu, Yang, Li: "Self expanding convolutional neural networks", 2024, arXiv:2401.05686.

The idea: an addition that leaves the function as it is (new units with zero outgoing weights, a layer that is the
identity) changes what a step *could* gain. The natural expansion score measures that gain; where an addition raises it
enough, the best one is made, and training goes on with the same weights and the same optimiser.

Notation: N samples, P parameters, g_i in R^P the gradient of sample i's loss, g their mean, G (N, P) their stack,
J (N * outputs, P) the Jacobian of the outputs, g_y (N * outputs) the stacked d loss_i / d output_i.

    eta   = g' F^-1 g                                                    natural expansion score, SENN eq. 3
    F     = (1/N) G' G                metric="empirical"      0 <= eta <= 1, and 1 as soon as rank(G) = N
    F     = (1/N) J' J                metric="output"         0 <= eta <= E ||g_y||^2
    exact: K = G G' (N, N),   eta = (1/N) 1' K (K + N eps I)^-1 1                     ``exact_score``; J, g_y for G, 1
           eps = 0:           eta = (1/N) || projection of g_y on range(J) ||^2
    diag:  eta = sum_k g_k^2 / (F_kk + eps)                                           ``diag_score``, SECNN

K-FAC, for each Linear or Conv2d l with inputs a (n, D) and gradients d (n, O) of its outputs; a convolution's inputs
are the patches under its kernel, a bias adds a constant 1, positions are summed inside the expectation:

    A = E[a a'] (D, D),  S = E[d d'] (O, O),  W = E[d a'] (O, D)
    eta_l = Tr(S^-1 W A^-1 W'),   eta = sum_l eta_l                                   ``kfac_score``

New inputs a_p (n, D_p) to layer l, whose present ones are a_c:

    r      = d - E[d a_c'] A_c^-1 a_c                   what the present inputs cannot explain
    Delta' = Tr(S^-1 E[r a_p'] A_p^-1 E[a_p r'])        lower bound, SENN theorem 3.2   ``increase_bound``
    Delta  = the same with A_p - A_pc A_c^-1 A_cp for A_p: the exact increase          ``increase_exact``

What is proposed: for each coupled set of channels (read off your own network, see ``core/channels``) ``proposals``
sets of ``units`` units, whose incoming weights are optimised on Delta' (``init="optimized"``: Adam; ``"mala"``:
Metropolis adjusted Langevin steps, as SENN does), or drawn (``"random"``; ``"noise"``: SECNN). And layers: an identity
in front of a layer (``identity="dirac"``), or, for a Linear y = W x + b, SENN's split: W1 x, a rational unit that
starts as the identity, then W W1^-1 and b (``identity="split"``; ``split_linear`` has the shift b1 as well).

When it is accepted. ``rule="senn"``: Delta / eta_l > tau - 1 and Delta / bound > alpha, the bound being the largest
value that eta can have, E ||g_y||^2 or 1; layers' increases are divided by ``layer_cost``; the largest ratio is made,
and all is asked again until nothing is accepted (or ``per_check`` were). ``rule="secnn"``: with eta_L the best layer's
eta and eta_I the best block's, each times exp(-penalty dp^2) for dp added parameters: the larger one, if above tau eta.

Stages. After every accepted expansion the network *before* it is kept as a stage, weights and all, as it was at that
moment: ``stage=0`` is the start, the newest stage is the live network. Earlier stages are records. They are not trained
further, and run in evaluation mode whatever the mode of the whole.

Optimisers stay valid. A parameter that grows stays the same object; its state (momentum, running averages) is kept for
the surviving entries and zero for the new ones, the step count is kept, and parameters of new layers join the group of
the layer that they feed. The optimiser is the one given to ``maybe_expand``, or else the one attached by
``attach_optimizer``, which ``fit`` calls with its own. With neither, no optimiser is patched.

Where the sources are silent or wrong, and what is done:

- SECNN's added layer is not function-preserving (the code's "identity" kernel is a box filter of nine taps; the new
  activation follows another one). Here a Dirac kernel, the BatchNorm absorbed (gamma = sqrt(v + eps), beta = m, with
  m, v of the score batch), and PReLU with slope 1, or (``activation="leaky"``) LeakyReLU whose slope goes from 1 to
  ``slope`` over the checks that follow.
- SECNN's code scores sum_b g_b^2 / (sum_b g_b^2 + eps), which ignores the sign of the gradients; here it is the mean
  gradient's square over the mean square, with the samples' own gradients. SECNN's lambda is not given: ``penalty`` = 0.
- SECNN's outgoing noise is 0 here, so that the function is kept exactly; its BatchNorms keep gamma and beta.
- A constant input is part of a only where the layer has a bias; a convolution before a BatchNorm has none to learn.
- Delta' does not see the scale of a unit (exactly so with ReLU), and a long optimisation makes units that a step of the
  optimiser cannot handle, or pairs that differ by next to nothing. So proposals are directions, with pre-activations
  of variance 1, and A_p is damped as S is. ``increase="schur"`` damps the final A_p as little as A.
- MALA's target exp(Delta' / (temperature eta_l)) has no finite mass; a prior N(0, 1) on directions and biases is added.
- Damping of A is not given; K-FAC uses 1e-6 of its mean diagonal, and S 0.1 of its own (SENN's code).
- LayerNorm normalises over the grown channels, so that new units would change the old ones. With new rows equal to the
  *mean* of the old ones, gamma sqrt(n / (n + C)) and eps n / (n + C) the old channels come out as before, exactly. Such
  units are constant at the start, so that Delta' = 0: they are never proposed, but ``widen`` can add them.
- Growth in several processes is refused: the ranks would have to agree on it.
- Samples to score are the last ones that ``loss`` saw in training mode since the last check. Checkpoints of ``fit``
  hold them, so that a resumed run checks the same ones; a network saved in evaluation mode does not.

The chapters: ``scores`` (what an addition is worth), ``surgery`` (how a network grows and keeps its function),
``proposals`` (what could be added), ``network`` (``SelfExpanding``, which decides), ``secnn`` (SECNN's start model).
"""

from pliant.elastic.self_expanding.network import SelfExpanding
from pliant.elastic.self_expanding.proposals import Candidate, Expansion
from pliant.elastic.self_expanding.scores import (
    diag_score,
    exact_score,
    increase_bound,
    increase_exact,
    kfac_increase,
    kfac_score,
    natural_expansion_score,
    penalised,
)
from pliant.elastic.self_expanding.secnn import SECNN, SECNN_OPTIONS, secnn
from pliant.elastic.self_expanding.surgery import Rational, Site, split_linear

__all__ = [
    "SECNN",
    "SECNN_OPTIONS",
    "Candidate",
    "Expansion",
    "Rational",
    "SelfExpanding",
    "Site",
    "diag_score",
    "exact_score",
    "increase_bound",
    "increase_exact",
    "kfac_increase",
    "kfac_score",
    "natural_expansion_score",
    "penalised",
    "secnn",
    "split_linear",
]
