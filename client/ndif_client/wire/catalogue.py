"""The closed catalogue of tensor operations a graph may use.

Each entry names one operation of torch, with torch's own argument names and meaning. The client
offers them as functions and proxy methods, the server maps each name to the one callable it may
run, and the reference page is generated from here. To add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Cost = Literal["free", "elementwise", "reduction", "matmul", "sort"]
Home = Literal["torch", "functional", "linalg", "special", "random"]


class Op(msgspec.Struct, frozen=True, kw_only=True):
    """One operation.

    Attributes:
        name: what graphs call it; also the function and the proxy method of that name.
        parameters: argument names in order, "tensor" ones first; `*` starts keyword-only ones.
        home: where torch keeps it: `torch.x`, `torch.nn.functional.x`, ...; "special"
            ones are written in the server's table, "random" ones draw from the request's own
            generator, on the CPU, one after another as they run.
        torch_name: its name there, when different.
        method: whether proxies offer it as a method (`self` is the first parameter).
        fields: names of the results, where there are several.
        differentiable: whether gradients flow through it.
        cost: how its price grows: "free" for views, "matmul" for contractions.
        bounded_index: position of a parameter whose values must be valid indices, checked before
            the kernel is launched.
        doc: one line for the reference.
    """

    name: str
    parameters: tuple[str, ...]
    doc: str
    home: Home = "torch"
    torch_name: str | None = None
    method: bool = True
    fields: tuple[str, ...] = ()
    differentiable: bool = True
    cost: Cost = "elementwise"
    bounded_index: int | None = None


def _ops() -> list[Op]:
    ops: list[Op] = []

    def unary(names: str, *, home: Home = "torch", differentiable: bool = True) -> None:
        for name in names.split():
            ops.append(
                Op(name=name, parameters=("input",), home=home, differentiable=differentiable,
                   doc=f"`{name}` of each element.")
            )  # fmt: skip

    def binary(names: str, *, differentiable: bool = True) -> None:
        for name in names.split():
            ops.append(
                Op(name=name, parameters=("input", "other"), differentiable=differentiable,
                   doc=f"`{name}` of two values, element by element, broadcasting.")
            )  # fmt: skip

    def reduction(names: str, extra: tuple[str, ...] = (), *, differentiable: bool = True) -> None:
        for name in names.split():
            ops.append(
                Op(name=name, parameters=("input", "dim", "keepdim", *extra), cost="reduction",
                   differentiable=differentiable, doc=f"`{name}` over `dim`, or over everything.")
            )  # fmt: skip

    def op(name: str, parameters: str, doc: str, **options: object) -> None:
        ops.append(
            msgspec.convert(
                {"name": name, "parameters": tuple(parameters.split()), "doc": doc, **options}, Op
            )
        )

    unary("neg abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal")
    unary("sin cos tan asin acos atan sinh cosh tanh sigmoid erf erfc erfinv lgamma digamma relu")
    unary("floor ceil trunc frac sign", differentiable=False)
    unary("isnan isinf isfinite logical_not bitwise_not", differentiable=False)
    unary("silu softplus logsigmoid mish relu6 hardswish selu softsign", home="functional")
    binary("mul fmod copysign floor_divide remainder maximum minimum atan2 logaddexp hypot xlogy")
    binary("eq ne lt le gt ge logical_and logical_or logical_xor", differentiable=False)
    binary("bitwise_and bitwise_or bitwise_xor isclose", differentiable=False)
    op("heaviside", "input values", "0 below 0, 1 above, `values` at 0.", differentiable=False)
    op("entr", "input", "`-x * log(x)` of each element, 0 at 0.", home="special", method=False)
    op("pow", "input exponent", "Each element to the power of `exponent`.")
    op("add", "input other * alpha", "Sum of two values; `alpha` scales the second.")
    op("sub", "input other * alpha", "Difference of two values; `alpha` scales the second.")
    op("div", "input other * rounding_mode", "Quotient of two values.", home="special")
    op("rsub", "input other", "`other - input`, for a number on the left.")
    op("addcmul", "input tensor1 tensor2 * value", "`input + value * tensor1 * tensor2`.")
    op("addcdiv", "input tensor1 tensor2 * value", "`input + value * tensor1 / tensor2`.")
    op("lerp", "input end weight", "Linear interpolation from `input` to `end`.")
    op("clamp", "input min max", "Each element limited to `[min, max]`.")
    op("clamp_min", "input min", "Each element, `min` at least.")
    op("clamp_max", "input max", "Each element, `max` at most.")
    op("round", "input * decimals", "Each element rounded.", differentiable=False)
    op("nan_to_num", "input nan posinf neginf", "NaN and infinities replaced by numbers.")
    op("gelu", "input * approximate", "Gaussian error linear unit.", home="functional")
    op("glu", "input dim", "First half times the sigmoid of the second half, along `dim`.",
       home="functional")  # fmt: skip
    op("leaky_relu", "input negative_slope", "Leaky ReLU.", home="functional")
    op("elu", "input alpha", "Exponential linear unit.", home="functional")
    op("softmax", "input dim dtype", "Softmax along `dim`.", cost="reduction")
    op("log_softmax", "input dim dtype", "Logarithm of softmax along `dim`.", cost="reduction")
    op("normalize", "input p dim eps", "Divide by the `p`-norm along `dim`.", home="functional",
       cost="reduction")  # fmt: skip
    op("layer_norm", "input normalized_shape weight bias eps", "Layer normalisation.",
       home="functional", cost="reduction")  # fmt: skip
    op("rms_norm", "input normalized_shape weight eps", "Root-mean-square normalisation.",
       home="functional", cost="reduction")  # fmt: skip

    op("sum", "input dim keepdim * dtype", "Sum over `dim`, or over everything.",
       cost="reduction")  # fmt: skip
    op("mean", "input dim keepdim * dtype", "Mean over `dim`, or over everything.",
       cost="reduction")  # fmt: skip
    op("prod", "input dim keepdim * dtype", "Product over `dim`, or over everything.",
       cost="reduction")  # fmt: skip
    op("std", "input dim * correction keepdim", "Standard deviation.", cost="reduction")
    op("var", "input dim * correction keepdim", "Variance.", cost="reduction")
    reduction("amax amin logsumexp nansum nanmean")
    reduction("argmax argmin all any count_nonzero", differentiable=False)
    ops[-1] = msgspec.structs.replace(ops[-1], parameters=("input", "dim"))
    op("norm", "input p dim keepdim", "The `p`-norm over `dim`, or of everything.",
       cost="reduction")  # fmt: skip
    op("max", "input dim keepdim", "Largest value; with `dim`, values and indices.",
       fields=("values", "indices"), cost="reduction")  # fmt: skip
    op("min", "input dim keepdim", "Smallest value; with `dim`, values and indices.",
       fields=("values", "indices"), cost="reduction")  # fmt: skip
    op("median", "input dim keepdim", "Median; with `dim`, values and indices.",
       fields=("values", "indices"), cost="sort")  # fmt: skip
    op("cumsum", "input dim", "Running sum along `dim`.", cost="reduction")
    op("cumprod", "input dim", "Running product along `dim`.", cost="reduction")
    op("logcumsumexp", "input dim", "Logarithm of the running sum of exponentials along `dim`.",
       cost="reduction")  # fmt: skip
    op("cummax", "input dim", "Running maximum along `dim`.", fields=("values", "indices"),
       cost="reduction")  # fmt: skip
    op("cummin", "input dim", "Running minimum along `dim`.", fields=("values", "indices"),
       cost="reduction")  # fmt: skip
    op("diff", "input n dim", "Differences of neighbours along `dim`, `n` times.")
    op("kthvalue", "input k dim keepdim", "The `k`-th smallest along `dim`.",
       fields=("values", "indices"), cost="sort")  # fmt: skip
    op("topk", "input k dim largest sorted", "The `k` largest along `dim`.",
       fields=("values", "indices"), cost="sort")  # fmt: skip
    op("sort", "input dim descending stable", "Sort along `dim`.", home="special",
       fields=("values", "indices"), cost="sort")  # fmt: skip
    op("argsort", "input dim descending stable", "Indices that sort along `dim`.", home="special",
       differentiable=False, cost="sort")  # fmt: skip
    op("quantile", "input q dim keepdim", "Quantiles along `dim`.", cost="sort")

    op("matmul", "input other", "Matrix product, broadcasting batch dimensions.", cost="matmul")
    op("mm", "input mat2", "Product of two matrices.", cost="matmul")
    op("bmm", "input mat2", "Batched product of matrices.", cost="matmul")
    op("mv", "input vec", "Matrix times vector.", cost="matmul")
    op("dot", "input tensor", "Inner product of two vectors.", cost="matmul")
    op("outer", "input vec2", "Outer product of two vectors.", cost="matmul")
    op("einsum", "equation operands", "Einstein summation; operands as one list.", home="special",
       method=False, cost="matmul")  # fmt: skip
    op("linear", "input weight bias", "`input @ weight.T + bias`.", home="functional",
       method=False, cost="matmul")  # fmt: skip
    op("matrix_exp", "input", "Matrix exponential: of a skew-symmetric matrix, a rotation.",
       cost="matmul")  # fmt: skip
    op("qr", "A mode", "QR decomposition; the columns of Q are orthonormal.", home="linalg",
       method=False, fields=("Q", "R"), cost="matmul")  # fmt: skip
    op("svd", "A full_matrices", "Singular value decomposition: `A = U @ diag(S) @ Vh`.",
       home="linalg", method=False, fields=("U", "S", "Vh"), cost="matmul")  # fmt: skip
    op("svdvals", "A", "Singular values, in descending order.", home="linalg", method=False,
       cost="matmul")  # fmt: skip
    op("eigh", "input UPLO", "Eigenvalues, ascending, and eigenvectors of a symmetric matrix.",
       home="linalg", method=False, fields=("eigenvalues", "eigenvectors"),
       cost="matmul")  # fmt: skip
    op("eigvalsh", "input UPLO", "Eigenvalues of a symmetric matrix, ascending.", home="linalg",
       method=False, cost="matmul")  # fmt: skip
    op("cholesky", "input", "Lower triangular factor of a positive definite matrix.", home="linalg",
       method=False, cost="matmul")  # fmt: skip
    op("solve", "A B", "`X` such that `A @ X = B`.", home="linalg", method=False,
       cost="matmul")  # fmt: skip
    op("inv", "A", "Inverse of a matrix.", home="linalg", method=False, cost="matmul")
    op("pinv", "input", "Pseudoinverse (Moore-Penrose) of a matrix.", home="linalg", method=False,
       cost="matmul")  # fmt: skip
    op("det", "A", "Determinant.", home="linalg", method=False, cost="matmul")
    op("slogdet", "A", "Sign and logarithm of the determinant.", home="linalg", method=False,
       fields=("sign", "logabsdet"), cost="matmul")  # fmt: skip
    op("matrix_power", "input n", "A matrix multiplied with itself `n` times.", home="linalg",
       method=False, cost="matmul")  # fmt: skip
    op("addmm", "input mat1 mat2 * beta alpha", "`beta * input + alpha * mat1 @ mat2`.",
       cost="matmul")  # fmt: skip
    op("baddbmm", "input batch1 batch2 * beta alpha", "`addmm` of batches of matrices.",
       cost="matmul")  # fmt: skip
    op("tensordot", "a b dims", "Products summed over `dims` dimensions, or two lists of them.",
       method=False, cost="matmul")  # fmt: skip
    op("kron", "input other", "Kronecker product.")
    op("cross", "input other dim", "Cross product of vectors of length 3.")
    op("trace", "input", "Sum of the diagonal of a matrix.", cost="reduction")
    op("low_rank", "input x a b scaling",
       "`input + scaling * x @ a.mT @ b.mT`, in float32 at least: what a LoRA adapter makes of a "
       "module's output and input. Of all users at once, where they share a forward.",
       home="special", method=False, cost="matmul")  # fmt: skip
    op("cdist", "x1 x2 p", "Distances between two sets of vectors.", method=False, cost="matmul")
    op("cosine_similarity", "x1 x2 dim eps", "Cosine of the angle along `dim`.", method=False,
       cost="reduction")  # fmt: skip
    op("vector_norm", "x ord dim keepdim", "Vector norm.", home="linalg", method=False,
       cost="reduction")  # fmt: skip

    op("cross_entropy", "input target * ignore_index reduction label_smoothing",
       "Cross entropy of logits and class indices.", home="functional", method=False,
       cost="reduction", bounded_index=1)  # fmt: skip
    op("kl_div", "input target * reduction log_target", "Kullback-Leibler divergence.",
       home="functional", method=False, cost="reduction")  # fmt: skip
    op("nll_loss", "input target * ignore_index reduction",
       "Negative log likelihood of log probabilities and class indices.", home="functional",
       method=False, cost="reduction", bounded_index=1)  # fmt: skip
    op("mse_loss", "input target * reduction", "Mean squared error.", home="functional",
       method=False, cost="reduction")  # fmt: skip
    op("l1_loss", "input target * reduction", "Mean absolute error.", home="functional",
       method=False, cost="reduction")  # fmt: skip
    op("smooth_l1_loss", "input target * reduction beta", "Squared below `beta`, absolute above.",
       home="functional", method=False, cost="reduction")  # fmt: skip
    op("huber_loss", "input target * reduction delta", "Huber loss.", home="functional",
       method=False, cost="reduction")  # fmt: skip
    op("binary_cross_entropy_with_logits", "input target * weight reduction pos_weight",
       "Binary cross entropy of logits and targets in [0, 1].", home="functional", method=False,
       cost="reduction")  # fmt: skip
    op("pairwise_distance", "x1 x2 p eps keepdim", "Distances between the rows of two values.",
       home="functional", method=False, cost="reduction")  # fmt: skip

    op("getitem", "input index", "Indexing: `input[index]`.", home="special", method=False,
       cost="free", bounded_index=1)  # fmt: skip
    op("setitem", "input index value", "`input` with `input[index]` replaced by `value`.",
       home="special", method=False, bounded_index=1)  # fmt: skip
    op("gather", "input dim index", "Values at `index` along `dim`.", bounded_index=2)
    op("scatter", "input dim index src", "`input` with `src` put at `index` along `dim`.",
       bounded_index=2)  # fmt: skip
    op("scatter_add", "input dim index src", "`input` with `src` added at `index` along `dim`.",
       bounded_index=2)  # fmt: skip
    op("index_select", "input dim index", "Whole slices at `index` along `dim`.",
       bounded_index=2)  # fmt: skip
    op("index_add", "input dim index source", "`source` added to the slices at `index`.",
       bounded_index=2)  # fmt: skip
    op("index_copy", "input dim index source", "`source` put at the slices at `index`.",
       bounded_index=2)  # fmt: skip
    op("index_fill", "input dim index value", "`value` put at the slices at `index`.",
       bounded_index=2)  # fmt: skip
    op("take_along_dim", "input indices dim", "Values at `indices` along `dim`.", bounded_index=1)
    op("embedding", "input weight", "Rows of `weight` at the ids `input`.", home="functional",
       method=False, bounded_index=0)  # fmt: skip
    op("one_hot", "input num_classes", "One-hot vectors; `num_classes` is required.",
       home="functional", differentiable=False, bounded_index=0)  # fmt: skip
    op("where", "condition input other", "`input` where `condition`, else `other`.", method=False)
    op("masked_fill", "input mask value", "`value` where `mask`.")

    for name, parameters, doc in (
        ("reshape", "input shape", "The same elements in another shape."),
        ("flatten", "input start_dim end_dim", "Dimensions merged into one."),
        ("unflatten", "input dim sizes", "One dimension split into several."),
        ("transpose", "input dim0 dim1", "Two dimensions swapped."),
        ("permute", "input dims", "Dimensions in another order."),
        ("movedim", "input source destination", "Dimensions moved."),
        ("squeeze", "input dim", "Dimensions of size 1 dropped."),
        ("unsqueeze", "input dim", "A dimension of size 1 inserted."),
        ("broadcast_to", "input size", "Expanded to `size` without copying."),
        ("narrow", "input dim start length", "`length` slices from `start` along `dim`."),
        ("select", "input dim index", "One slice along `dim`."),
        ("diagonal", "input offset dim1 dim2", "The diagonal of two dimensions."),
        ("detach", "input", "The value without its gradient history."),
    ):
        op(name, parameters, doc, cost="free")
    op("view", "input shape", "The same elements in another shape.", home="special", cost="free")
    op("reshape_as", "input other", "The same elements in the shape of `other`.", home="special",
       cost="free")  # fmt: skip
    op("unfold", "input dimension size step", "Windows of `size` slices along a dimension.",
       home="special", cost="free")  # fmt: skip
    op("expand", "input shape", "Expanded to `shape`, -1 keeps a dimension.", home="special",
       cost="free")  # fmt: skip
    op("repeat", "input repeats", "Repeated along each dimension.", home="special")
    op("split", "tensor split_size_or_sections dim", "A tuple of pieces along `dim`.", cost="free")
    op("chunk", "input chunks dim", "A tuple of `chunks` pieces along `dim`.", cost="free")
    op("unbind", "input dim", "A tuple of slices along `dim`.", cost="free")
    op("cat", "tensors dim", "Tensors joined along `dim`.", method=False)
    op("stack", "tensors dim", "Tensors joined along a new dimension.", method=False)
    op("vstack", "tensors", "Tensors joined along the first dimension.", method=False)
    op("hstack", "tensors", "Tensors joined along the second dimension.", method=False)
    op("pad", "input pad mode value", "Values put before and after, from the last dimension on.",
       home="functional", method=False)  # fmt: skip
    op("tile", "input dims", "Repeated along the last dimensions.")
    op("isin", "elements test_elements", "Which elements are among others.", method=False,
       differentiable=False)  # fmt: skip
    op("flip", "input dims", "Reversed along `dims`.")
    op("roll", "input shifts dims", "Rolled along `dims`.")
    op("repeat_interleave", "input repeats dim", "Each slice repeated `repeats` times (a number).")
    op("tril", "input diagonal", "Lower triangle.")
    op("triu", "input diagonal", "Upper triangle.")
    op("diag", "input diagonal", "Diagonal matrix from a vector, or the reverse.")
    op("clone", "input", "A copy.")
    op("to", "input dtype", "The value in another dtype.", home="special")
    op("type_as", "input other", "The value in the dtype of `other`.", home="special")

    op("zeros", "size * dtype", "Zeros.", method=False, differentiable=False)
    op("ones", "size * dtype", "Ones.", method=False, differentiable=False)
    op("full", "size fill_value * dtype", "A constant.", method=False, differentiable=False)
    op("arange", "start end step * dtype", "Numbers from `start` to `end`.", method=False,
       differentiable=False)  # fmt: skip
    op("linspace", "start end steps * dtype", "`steps` numbers from `start` to `end`.",
       method=False, differentiable=False)  # fmt: skip
    op("eye", "n m * dtype", "The identity matrix.", method=False, differentiable=False)
    op("zeros_like", "input * dtype", "Zeros of the same shape.", differentiable=False)
    op("ones_like", "input * dtype", "Ones of the same shape.", differentiable=False)
    op("full_like", "input fill_value * dtype", "A constant of the same shape.",
       differentiable=False)  # fmt: skip

    for name, doc in (
        ("rand", "Uniform random numbers in [0, 1)."),
        ("randn", "Standard normal random numbers."),
    ):
        op(name, "size * dtype", doc, home="random", method=False, differentiable=False)
        op(f"{name}_like", "input * dtype", f"{doc[:-1]}, in the same shape.", home="random",
           differentiable=False)  # fmt: skip
    op("randint", "low high size * dtype", "Random integers from `low` to below `high`.",
       home="random", method=False, differentiable=False)  # fmt: skip
    op("randperm", "n * dtype", "A random permutation of 0 to `n - 1`.", home="random",
       method=False, differentiable=False)  # fmt: skip
    op("bernoulli", "input", "1 with the probability in each element, else 0.", home="random",
       differentiable=False)  # fmt: skip
    op("dropout", "input p", "Elements zeroed with probability `p`, the others scaled up.",
       home="random")  # fmt: skip
    op("multinomial", "input num_samples replacement", "Indices drawn by the weights in each row.",
       home="random", differentiable=False)  # fmt: skip
    return ops


CATALOGUE: dict[str, Op] = {op.name: op for op in _ops()}

#: Other names torch users know for the same operation.
ALIASES: dict[str, str] = {
    "absolute": "abs", "bitwise_invert": "bitwise_not", "clip": "clamp", "concat": "cat",
    "concatenate": "cat", "divide": "div", "equal": "eq", "greater": "gt", "greater_equal": "ge",
    "less": "lt", "less_equal": "le", "moveaxis": "movedim", "multiply": "mul",
    "negative": "neg", "not_equal": "ne", "pinverse": "pinv", "subtract": "sub",
    "swapaxes": "transpose", "swapdims": "transpose", "true_divide": "div", "view_as": "reshape_as",
}  # fmt: skip
