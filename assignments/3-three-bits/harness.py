"""What is called of a submission of *Three bits*, and with what."""

import torch

TOLERANCE = {"q1": 1e-6, "q2": 0, "q3": 1e-4, "q4": 1e-4, "q5": 1e-4}


def weight(draw, rows, columns):
    """Numbers like those of a matrix, with an outlier and a row of zeros."""
    numbers = draw.numbers(rows, columns) * 0.05
    numbers[0, 0] = 0.7
    numbers[rows // 2] = 0
    return numbers


def cases(question, draw):
    """[(tensors, settings)]."""

    if question == "q1":
        return [({}, {"bits": bits}) for bits in (2, 3, 5, 6)]
    if question == "q2":
        lengths = [8 * draw.whole(3, 20), 8 * draw.whole(3, 20) + draw.whole(1, 8), draw.whole(1, 8)]
        return [({"codes": torch.randint(8, (n,), generator=draw.generator)}, {}) for n in lengths]
    if question == "q3":
        blocks = [2 ** draw.whole(4, 8) for _ in range(4)]
        return [
            ({"weight": weight(draw, draw.whole(5, 30), draw.whole(30, 70))}, {"block_size": block}) for block in blocks
        ]
    if question == "q4":
        return [  # of numbers so small that rounding a scale to float16 is seen, too
            ({"weight": size * weight(draw, 32, 16 * draw.whole(4, 9))}, {"sizes": [16, 2 ** draw.whole(5, 8), 512]})
            for size in (1, 3e-6)
        ]
    return [
        ({"weight": weight(draw, draw.whole(8, 20), draw.whole(41, 64))}, {"block_size": 2 ** draw.whole(4, 7)})
        for _ in "abc"
    ]


def call(question, functions, inputs, settings):
    """Tensors that the submission's functions give."""
    if question == "q1":
        return {"levels": torch.as_tensor(functions["normal_float"](settings["bits"]))}
    if question == "q2":
        packed = functions["pack3"](inputs["codes"])
        return {"packed": packed, "codes": functions["unpack3"](packed, len(inputs["codes"]))}
    numbers = inputs["weight"]
    if question == "q3":
        packed, scales = functions["quantize3"](numbers, settings["block_size"])
        back = functions["dequantize3"](packed, scales, numbers.shape, settings["block_size"])
        return {"scales": scales, "numbers": back, "bytes": torch.tensor([packed.numel() * packed.element_size()])}
    if question == "q4":
        rows = functions["error_curve"](numbers, settings["sizes"])
        return {"curve": torch.tensor([[float(bits), float(error)] for bits, error in rows])}
    shares = torch.linspace(0.5, 1, 11)
    return {"scales": functions["best_scales"](numbers, settings["block_size"], shares)}
