"""What the measures of a clip mean, in one place, for reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Definition:
    """A measure: `better` is "higher", "lower", "near 0", or "" where neither is."""

    title: str
    unit: str
    better: str
    text: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


DEFINITIONS: dict[str, Definition] = {
    "brightness_drift": Definition(
        "brightness drift", "grey levels per minute", "near 0",
        "Least-squares slope of the mean luma of a second over time; its interval allows for correlated seconds.",
    ),
    "contrast_drift": Definition(
        "contrast drift", "grey levels per minute", "near 0",
        "The same for the standard deviation of luma within a frame.",
    ),
    "sharpness_drift": Definition(
        "sharpness drift", "percent per minute", "near 0",
        "The same for the standard deviation of the luma's Laplacian, in percent of the clip's mean.",
    ),
    "flicker": Definition(
        "flicker", "grey levels", "lower",
        "Mean over pixels and frames of how far a pixel goes away and comes back within three frames; what moves past "
        "or fades counts for nothing.",
    ),
    "dynamic_degree": Definition(
        "dynamic degree", "frame widths per second", "",
        "Optical flow (Lucas-Kanade) between neighbouring frames: mean speed of the fastest twentieth of the pixels, "
        "averaged over the clip.",
    ),
    "repetition": Definition(
        "repetition", "0 to 1", "lower",
        "How much of its likeness to itself a clip regains at a later lag after having lost it: 1 is a loop or a "
        "frozen picture. What moves to and fro by nature repeats itself too.",
    ),
    "clock_lawful": Definition(
        "clock lawful", "share of frames", "higher",
        "Frames into which the clock hand of the procedural world moved by one lawful step.",
    ),
    "psnr_db": Definition(
        "PSNR", "dB", "higher",
        "Peak signal to noise ratio against the same take without reuse, mean over frames; equal frames count 100.",
    ),
    "ssim": Definition(
        "SSIM", "−1 to 1", "higher",
        "Structural similarity (Wang et al. 2004, grey) to the same take without reuse, mean over frames.",
    ),
    "lpips": Definition("LPIPS", "0 and more", "lower", "Learned perceptual distance to the same take without reuse."),
}  # fmt: skip
