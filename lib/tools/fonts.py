"""Make the font of formulas: STIX Two Math, cut to the characters that formulas use, with two mends for Chromium.

    python lib/tools/fonts.py     # needs npm; writes book/_static/fonts

A formula with a character that is not in the font fails a test: add it to CHARACTERS and run this again.
"""

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

PACKAGE, FILE = "@fontsource/stix-two-math@5.3.0", "files/stix-two-math-latin-400-normal.woff2"
SHA256 = "8b2a6834cfe1f4e0f3724ffa59fe92000013fc5a4c41e6a3f438006c26c60f0d"
FOLDER = Path(__file__).parents[2] / "book" / "_static" / "fonts"
CHARACTERS = (
    *range(0x20, 0x7F),
    *range(0x391, 0x3AA),  # Greek
    *range(0x3B1, 0x3CA),
    *map(ord, "ϑϕϖϱϵ"),
    *range(0x1D400, 0x1D49C),  # Latin letters bold, italic, both (browsers take the italic ones for a single letter)
    0x210E,
    *range(0x1D6FC, 0x1D71C),  # Greek letters italic
    *range(0x1D49C, 0x1D4B6),  # script
    *map(ord, "ℬℰℱℋℐℒℳℛ"),
    *range(0x1D538, 0x1D551),  # double-struck
    *map(ord, "ℂℍℕℙℚℝℤ𝟙"),
    *map(ord, "\xa0·±×÷¬¯ˆ˜…⋯⋮⋱′″‖∣∥←→↔⇒⇐⇔↦∂∇∞∈∉∑∏√−∗∘∙∝≈≠≡≤≥≪≫∼≃⊂⊆∪∩∧∨⊕⊗⊙⊤⊥∀∃∅⟨⟩⌈⌉⌊⌋ℓ∫⏟⏞"),
)


def source():
    """The font and its licence from the npm package, as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as package:
            font, licence = (package.extractfile(f"package/{name}").read() for name in (FILE, "LICENSE"))
    if hashlib.sha256(font).hexdigest() != SHA256:
        raise ValueError(
            f"{PACKAGE} holds another font than the one that was cut here before; look at it, then set SHA256"
        )
    return font, licence


def mend(font):
    """Chromium lowers a subscript by what its base descends, and reserves the width of a root's widest form."""
    font["MATH"].table.MathConstants.SubscriptBaselineDropMin.Value = -100
    variants = font["MATH"].table.MathVariants
    root = font.getBestCmap()[ord("√")]
    forms = variants.VertGlyphConstruction[variants.VertGlyphCoverage.glyphs.index(root)]
    forms.GlyphAssembly, forms.MathGlyphVariantRecord = None, forms.MathGlyphVariantRecord[:2]
    tall = forms.MathGlyphVariantRecord[1].VariantGlyph
    narrower = 0.87
    font["glyf"][tall].coordinates.scale((narrower, 1))
    font["glyf"][tall].recalcBounds(font["glyf"])
    font["hmtx"][tall] = tuple(round(narrower * value) for value in font["hmtx"][tall])


def main():
    data, licence = source()
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "OFL.txt").write_bytes(licence)
    out = FOLDER / "stix-two-math.woff2"
    out.write_bytes(data)
    font = TTFont(out, recalcTimestamp=False)
    mend(font)
    options = subset.Options(flavor="woff2", layout_features=[], hinting=False)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=CHARACTERS)
    cutter.subset(font)
    subset.save_font(font, out, options)
    print(f"{out.name}: {len(font.getBestCmap())} characters, {out.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
