"""A small convolutional encoder and decoder for binary 28 × 28 images."""

from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent

from fastkm._runtime import guards

__all__ = ["ConvDecoder", "ConvEncoder"]

SIDE = 28


def _activation(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.ELU()


class ConvEncoder(nn.Module):
    """Images ``[N, 1, 28, 28]`` to codes ``[N, C]``: three strided convolutions and a linear map.

    Batch normalisation follows each convolution, without which training takes several times as long: put the model in
    ``eval()`` before it is used.

    Args:
        code_size: C.
        width: channels of the first convolution; the second has twice, the third four times as many.
    """

    def __init__(self, code_size: int, width: int = 24) -> None:
        super().__init__()
        guards.count("code_size", code_size)
        guards.count("width", width)
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1, bias=False),  # [N, W, 14, 14]
            *_activation(width),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),  # [N, 2W, 7, 7]
            *_activation(2 * width),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False),  # [N, 4W, 4, 4]
            *_activation(4 * width),
            nn.Flatten(),
            nn.Linear(4 * width * 4 * 4, code_size),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ConvDecoder(nn.Module):
    """Codes ``[N, C]`` to the distribution of images ``[N, 1, 28, 28]``, an independent Bernoulli a pixel.

    The mirror image of :class:`ConvEncoder`. Its log-likelihood is linear in the pixels, so that it takes grey values
    in [0, 1] as well.

    Args:
        code_size: C.
        width: channels of the last hidden layer, as in :class:`ConvEncoder`.
    """

    def __init__(self, code_size: int, width: int = 24) -> None:
        super().__init__()
        guards.count("code_size", code_size)
        guards.count("width", width)
        self.layers = nn.Sequential(
            nn.Linear(code_size, 4 * width * 4 * 4, bias=False),
            nn.Unflatten(1, (4 * width, 4, 4)),
            *_activation(4 * width),
            nn.ConvTranspose2d(4 * width, 2 * width, 3, stride=2, padding=1, bias=False),  # [N, 2W, 7, 7]
            *_activation(2 * width),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),  # [N, W, 14, 14]
            *_activation(width),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),  # [N, 1, 28, 28]
        )

    def forward(self, codes: Tensor) -> Independent:
        return Independent(Bernoulli(logits=self.layers(codes), validate_args=False), 3, validate_args=False)
