"""The closed catalogue of tensor operations a graph may use.

Each entry names one operation of torch, with torch's own argument names and meaning. The client
offers them as functions and proxy methods, the server maps each name to the one callable it may
run, and the reference page is generated from here. To add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Cost = Literal["free", "elementwise", "reduction", "matmul", "sort"]
Home = Literal["torch", "functional", "linalg", "fft", "special", "random"]


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
    unary("sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sinc logit")
    unary("sigmoid erf erfc erfinv lgamma digamma relu real imag angle")
    unary("floor ceil trunc frac sign", differentiable=False)
    unary("isnan isinf isfinite signbit logical_not bitwise_not", differentiable=False)
    unary("silu logsigmoid mish relu6 hardswish hardsigmoid selu softsign tanhshrink",
          home="functional")  # fmt: skip
    op("softplus", "input beta threshold", "Softplus.", home="functional")
    op("hardtanh", "input min_val max_val", "Each element limited to a range.",
       home="functional")  # fmt: skip
    op("threshold", "input threshold value", "`value` where not above `threshold`.",
       home="functional")  # fmt: skip
    op("celu", "input alpha", "Celu.", home="functional")
    op("prelu", "input weight", "Leaky ReLU with a slope of each channel.", home="functional")
    binary("mul fmod copysign floor_divide remainder maximum minimum atan2 logaddexp logaddexp2")
    binary("hypot xlogy ldexp")
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
    op("allclose", "input other rtol atol equal_nan", "Whether all elements are close: one bool.",
       home="special", cost="reduction", differentiable=False)  # fmt: skip
    op("equal", "input other", "Whether shapes and elements are equal: one bool.",
       home="special", cost="reduction", differentiable=False)  # fmt: skip
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
    op("var_mean", "input dim * correction keepdim", "Variance and mean.", cost="reduction",
       method=False, fields=("var", "mean"))  # fmt: skip
    op("std_mean", "input dim * correction keepdim", "Standard deviation and mean.",
       cost="reduction", method=False, fields=("std", "mean"))  # fmt: skip
    op("aminmax", "input * dim keepdim", "Smallest and largest value.", cost="reduction",
       fields=("min", "max"))  # fmt: skip
    op("cov", "input * correction", "Covariances of the rows.", home="special", cost="matmul")
    op("corrcoef", "input", "Correlations of the rows.", home="special", cost="matmul")
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
    op("mode", "input dim keepdim", "Most frequent value along `dim`.",
       fields=("values", "indices"), cost="sort")  # fmt: skip
    op("cumsum", "input dim * dtype", "Running sum along `dim`.", cost="reduction")
    op("cumprod", "input dim * dtype", "Running product along `dim`.", cost="reduction")
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
    op("quantile", "input q dim keepdim * interpolation", "Quantiles along `dim`.", cost="sort")
    op("msort", "input", "Sorted along the first dimension.", cost="sort")
    op("bucketize", "input boundaries * right", "Which bucket each element falls into.",
       differentiable=False, method=False, cost="sort")  # fmt: skip
    op("searchsorted", "sorted_sequence input * right", "Where elements would be inserted.",
       differentiable=False, method=False, cost="sort")  # fmt: skip
    op("histc", "input bins min max", "Histogram; `min` and `max` are required.", home="special",
       differentiable=False, cost="sort")  # fmt: skip
    op("bincount", "input weights minlength",
       "How often each number below `minlength` occurs; it is required.", home="special",
       differentiable=False, cost="sort", bounded_index=0)  # fmt: skip
    op("trapezoid", "y x", "Integral along the last dimension.", method=False)

    op("matmul", "input other", "Matrix product, broadcasting batch dimensions.", cost="matmul")
    op("mm", "input mat2", "Product of two matrices.", cost="matmul")
    op("bmm", "input mat2", "Batched product of matrices.", cost="matmul")
    op("mv", "input vec", "Matrix times vector.", cost="matmul")
    op("dot", "input tensor", "Inner product of two vectors.", cost="matmul")
    op("inner", "input other", "Inner products over the last dimension.", cost="matmul")
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
    op("lstsq", "A B", "`solution` for which `A @ solution` is nearest to `B`; `A` has full rank.",
       home="special", method=False, fields=("solution",), cost="matmul")  # fmt: skip
    op("matrix_norm", "input ord dim keepdim", "Norm of matrices.", home="linalg", method=False,
       cost="matmul")  # fmt: skip
    op("linalg_norm", "input ord dim keepdim * dtype", "`torch.linalg.norm`.", home="linalg",
       torch_name="norm", method=False, cost="matmul")  # fmt: skip
    op("linalg_cross", "input other * dim", "`torch.linalg.cross`: of vectors of length 3.",
       home="linalg", torch_name="cross", method=False)  # fmt: skip
    op("linalg_diagonal", "A * offset dim1 dim2", "`torch.linalg.diagonal`: of the last two.",
       home="linalg", torch_name="diagonal", method=False, cost="free")  # fmt: skip
    op("multi_dot", "tensors", "Product of several matrices.", home="linalg", method=False,
       cost="matmul")  # fmt: skip
    op("vecdot", "x y * dim", "Inner products along `dim`.", home="linalg", method=False,
       cost="matmul")  # fmt: skip
    op("inv", "A", "Inverse of a matrix.", home="linalg", method=False, cost="matmul")
    op("pinv", "input", "Pseudoinverse (Moore-Penrose) of a matrix.", home="linalg", method=False,
       cost="matmul")  # fmt: skip
    op("det", "A", "Determinant.", home="linalg", method=False, cost="matmul")
    op("logdet", "input", "Logarithm of the determinant.", cost="matmul")
    op("slogdet", "A", "Sign and logarithm of the determinant.", home="linalg", method=False,
       fields=("sign", "logabsdet"), cost="matmul")  # fmt: skip
    op("matrix_power", "input n", "A matrix multiplied with itself `n` times.", home="linalg",
       method=False, cost="matmul")  # fmt: skip
    op("addmm", "input mat1 mat2 * beta alpha", "`beta * input + alpha * mat1 @ mat2`.",
       cost="matmul")  # fmt: skip
    op("baddbmm", "input batch1 batch2 * beta alpha", "`addmm` of batches of matrices.",
       cost="matmul")  # fmt: skip
    op("addmv", "input mat vec * beta alpha", "`beta * input + alpha * mat @ vec`.",
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

    op("scaled_dot_product_attention", "query key value attn_mask dropout_p is_causal scale",
       "Softmax attention; without dropout.", home="special",
       method=False, cost="matmul")  # fmt: skip
    op("conv1d", "input weight bias stride padding dilation groups", "Convolution.",
       home="functional", method=False, cost="matmul")  # fmt: skip
    op("avg_pool1d", "input kernel_size stride padding", "Means of windows.", home="functional",
       method=False)  # fmt: skip
    for name in ("fft", "ifft", "rfft", "irfft"):
        op(f"fft_{name}", "input n dim norm", f"`torch.fft.{name}`.", home="fft", torch_name=name,
           method=False, cost="sort")  # fmt: skip

    op("cross_entropy", "input target * weight ignore_index reduction label_smoothing",
       "Cross entropy of logits and class indices, or probabilities.", home="functional",
       method=False, cost="reduction", bounded_index=1)  # fmt: skip
    op("kl_div", "input target * reduction log_target", "Kullback-Leibler divergence.",
       home="functional", method=False, cost="reduction")  # fmt: skip
    op("nll_loss", "input target * weight ignore_index reduction",
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
    op("binary_cross_entropy", "input target * weight reduction",
       "Binary cross entropy of probabilities.", home="functional", method=False,
       cost="reduction")  # fmt: skip
    op("cosine_embedding_loss", "input1 input2 target * margin reduction",
       "Distance by cosine of pairs that are (1) or are not (-1) alike.", home="functional",
       method=False, cost="reduction")  # fmt: skip
    op("margin_ranking_loss", "input1 input2 target * margin reduction",
       "Hinge loss of which is to be larger.", home="functional", method=False,
       cost="reduction")  # fmt: skip
    op("triplet_margin_loss", "anchor positive negative * margin p eps swap reduction",
       "Hinge loss of the distances from an anchor.", home="functional", method=False,
       cost="reduction")  # fmt: skip
    op("dist", "input other p", "`p`-norm of the difference.", cost="reduction")
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
    op("scatter_reduce", "input dim index src reduce * include_self",
       "`src` reduced into `input` at `index` along `dim`.", bounded_index=2)  # fmt: skip
    op("index_select", "input dim index", "Whole slices at `index` along `dim`.",
       bounded_index=2)  # fmt: skip
    op("index_add", "input dim index source", "`source` added to the slices at `index`.",
       bounded_index=2)  # fmt: skip
    op("index_copy", "input dim index source", "`source` put at the slices at `index`.",
       bounded_index=2)  # fmt: skip
    op("index_fill", "input dim index value", "`value` put at the slices at `index`.",
       bounded_index=2)  # fmt: skip
    op("take", "input index", "Elements by their number in the flattened value.",
       bounded_index=1)  # fmt: skip
    op("take_along_dim", "input indices dim", "Values at `indices` along `dim`.", bounded_index=1)
    op("embedding", "input weight", "Rows of `weight` at the ids `input`.", home="functional",
       method=False, bounded_index=0)  # fmt: skip
    op("one_hot", "input num_classes", "One-hot vectors; `num_classes` is required.",
       home="functional", differentiable=False, bounded_index=0)  # fmt: skip
    op("where", "condition input other", "`input` where `condition`, else `other`.",
       method=False)  # fmt: skip
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
        ("t", "input", "A matrix transposed; a vector as it is."),
        ("detach", "input", "The value without its gradient history."),
    ):
        op(name, parameters, doc, cost="free")
    op("view", "input shape", "The same elements in another shape.", home="special", cost="free")
    op("reshape_as", "input other", "The same elements in the shape of `other`.", home="special",
       cost="free")  # fmt: skip
    op("expand_as", "input other", "Expanded to the shape of `other`.", home="special",
       cost="free")  # fmt: skip
    op("unfold", "input dimension size step", "Windows of `size` slices along a dimension.",
       home="special", cost="free")  # fmt: skip
    op("expand", "input shape", "Expanded to `shape`, -1 keeps a dimension.", home="special",
       cost="free")  # fmt: skip
    op("repeat", "input repeats", "Repeated along each dimension.", home="special")
    op("split", "tensor split_size_or_sections dim", "A tuple of pieces along `dim`.", cost="free")
    op("chunk", "input chunks dim", "A tuple of `chunks` pieces along `dim`.", cost="free")
    op("tensor_split", "input indices_or_sections dim", "A tuple of pieces along `dim`.",
       home="special", cost="free")  # fmt: skip
    op("unbind", "input dim", "A tuple of slices along `dim`.", cost="free")
    op("cat", "tensors dim", "Tensors joined along `dim`.", method=False)
    op("stack", "tensors dim", "Tensors joined along a new dimension.", method=False)
    op("vstack", "tensors", "Tensors joined along the first dimension.", method=False)
    op("hstack", "tensors", "Tensors joined along the second dimension.", method=False)
    op("dstack", "tensors", "Tensors joined along the third dimension.", method=False)
    op("column_stack", "tensors", "Vectors as the columns of a matrix.", method=False)
    op("block_diag", "tensors", "Matrices along the diagonal of one.", method=False,
       home="special")  # fmt: skip
    op("meshgrid", "tensors indexing", "Grids of the coordinates in vectors.", method=False,
       home="special")  # fmt: skip
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
    op("diag_embed", "input offset dim1 dim2", "Diagonal matrices from vectors.")
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
    op("tril_indices", "row col offset * dtype", "Places of the lower triangle.", method=False,
       differentiable=False)  # fmt: skip
    op("triu_indices", "row col offset * dtype", "Places of the upper triangle.", method=False,
       differentiable=False)  # fmt: skip
    for name in ("zeros", "ones"):
        op(f"new_{name}", "input size * dtype", f"{name.capitalize()} of the same dtype.",
           home="special", differentiable=False)  # fmt: skip
    op("new_full", "input size fill_value * dtype", "A constant of the same dtype.",
       home="special", differentiable=False)  # fmt: skip
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
    op("dropout", "input p training", "Elements zeroed with probability `p`, the others scaled up.",
       home="random")  # fmt: skip
    op("multinomial", "input num_samples replacement", "Indices drawn by the weights in each row.",
       home="random", differentiable=False)  # fmt: skip
    return ops


CATALOGUE: dict[str, Op] = {op.name: op for op in _ops()}

#: Other names torch users know for the same operation.
ALIASES: dict[str, str] = {
    "absolute": "abs", "arccos": "acos", "arcsin": "asin", "arctan": "atan", "arctan2": "atan2",
    "bitwise_invert": "bitwise_not", "clip": "clamp", "concat": "cat", "concatenate": "cat",
    "divide": "div", "expit": "sigmoid", "fix": "trunc", "ger": "outer", "greater": "gt",
    "greater_equal": "ge", "inverse": "inv", "less": "lt", "less_equal": "le",
    "moveaxis": "movedim", "multiply": "mul", "negative": "neg", "not_equal": "ne",
    "pinverse": "pinv", "ravel": "flatten", "row_stack": "vstack", "subtract": "sub",
    "swapaxes": "transpose", "swapdims": "transpose", "trapz": "trapezoid",
    "true_divide": "div", "view_as": "reshape_as",
}  # fmt: skip
