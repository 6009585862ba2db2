"""The best sample as an integer program, solved exactly: the classical way from sensitivities to formats."""

from __future__ import annotations

import numpy as np

from fliqs_tf import costs


def solve(effects: np.ndarray, mask: np.ndarray, table: costs.CostTable, target: float) -> np.ndarray:
    """The sample of greatest total effect among those that cost no more than the target.

    One binary variable per option; where a cost depends on two decisions at once (weights and activations apart), one
    more for each pair of their options.

    Args:
      effects: [D, N]; effect of each option on quality.
      mask: bool [D, N], False for padding.
      table: Costs of samples.
      target: Greatest cost, in the table's unit.

    Returns:
      int32 [D].

    Raises:
      ImportError: SciPy is missing; says what to install.
      ValueError: No sample costs so little.
    """
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise ImportError("The integer program needs SciPy. Run `pip install fliqs-tf[milp]`.") from error
    decisions, options = np.nonzero(mask)
    place = {(d, o): i for i, (d, o) in enumerate(zip(decisions.tolist(), options.tolist(), strict=True))}
    price = list(table.tables[decisions, options])
    rows: list[tuple[list[int], list[float], float]] = []  # columns, coefficients, right side of an equation
    for d in range(len(mask)):
        own = [place[d, o] for o in np.nonzero(mask[d])[0].tolist()]
        rows.append((own, [1.0] * len(own), 1.0))
    for (w, a), matrix in table.pairs.items():
        first = len(price)
        of_w, of_a = np.nonzero(mask[w])[0].tolist(), np.nonzero(mask[a])[0].tolist()
        price += [matrix[i, j] for i in of_w for j in of_a]
        pair = np.arange(first, len(price)).reshape(len(of_w), len(of_a))
        # A pair of options is taken where both are: its sums over one side are the options of the other.
        rows += [([*pair[n].tolist(), place[w, i]], [1.0] * len(of_a) + [-1.0], 0.0) for n, i in enumerate(of_w)]
        rows += [([*pair[:, n].tolist(), place[a, j]], [1.0] * len(of_w) + [-1.0], 0.0) for n, j in enumerate(of_a)]
    size = len(price)
    gain = np.zeros(size)
    gain[: len(place)] = effects[decisions, options]
    equations = sparse.lil_matrix((len(rows), size))
    for n, (columns, coefficients, _) in enumerate(rows):
        equations[n, columns] = coefficients
    right = np.array([value for *_, value in rows])
    scale = max(np.max(np.abs(price)), 1e-30)  # the solver's tolerances are absolute
    limit = (target * table.per_unit - table.constant) / scale
    found = optimize.milp(
        -gain / max(np.max(np.abs(gain)), 1e-30),
        constraints=[
            optimize.LinearConstraint(equations.tocsr(), right, right),
            optimize.LinearConstraint(np.array(price)[None] / scale, -np.inf, limit),
        ],
        integrality=np.ones(size),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise ValueError(f"No choice of formats costs {target:.6g} {table.unit} or less.")
    taken = np.zeros(mask.shape)
    taken[decisions, options] = found.x[: len(place)]
    return taken.argmax(axis=1).astype(np.int32)
