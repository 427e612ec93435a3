"""Cutting text where its writing system changes, as SentencePiece's trainer does.

Source: Unicode Standard Annex 24, "Unicode script property"; as Hugging Face's `tokenizers` has it.
"""

from __future__ import annotations

import re
from typing import Any

import regex

from minillm.tokenizers.piece_pattern import PiecePattern

# All but Common and those of Japanese. The most frequent first: they are tried in this order.
SCRIPTS = """
    Latin Cyrillic Arabic Devanagari Greek Hangul Hebrew Thai Inherited Bengali Tamil Telugu Georgian Armenian
    Adlam Ahom Anatolian_Hieroglyphs Avestan Balinese Bamum Bassa_Vah Batak Bhaiksuki Bopomofo Brahmi Braille Buginese
    Buhid Canadian_Aboriginal Carian Caucasian_Albanian Chakma Cham Cherokee Chorasmian Coptic Cuneiform Cypriot
    Cypro_Minoan Deseret Dives_Akuru Dogra Duployan Egyptian_Hieroglyphs Elbasan Elymaic Ethiopic Glagolitic Gothic
    Grantha Gujarati Gunjala_Gondi Gurmukhi Hanifi_Rohingya Hanunoo Hatran Imperial_Aramaic Inscriptional_Pahlavi
    Inscriptional_Parthian Javanese Kaithi Kannada Kawi Kayah_Li Kharoshthi Khitan_Small_Script Khmer Khojki Khudawadi
    Lao Lepcha Limbu Linear_A Linear_B Lisu Lycian Lydian Mahajani Makasar Malayalam Mandaic Manichaean Marchen
    Masaram_Gondi Medefaidrin Meetei_Mayek Mende_Kikakui Meroitic_Cursive Meroitic_Hieroglyphs Miao Modi Mongolian Mro
    Multani Myanmar Nabataean Nag_Mundari Nandinagari New_Tai_Lue Newa Nko Nushu Nyiakeng_Puachue_Hmong Ogham Ol_Chiki
    Old_Hungarian Old_Italic Old_North_Arabian Old_Permic Old_Persian Old_Sogdian Old_South_Arabian Old_Turkic
    Old_Uyghur Oriya Osage Osmanya Pahawh_Hmong Palmyrene Pau_Cin_Hau Phags_Pa Phoenician Psalter_Pahlavi Rejang Runic
    Samaritan Saurashtra Sharada Shavian Siddham SignWriting Sinhala Sogdian Sora_Sompeng Soyombo Sundanese
    Syloti_Nagri Syriac Tagalog Tagbanwa Tai_Le Tai_Tham Tai_Viet Takri Tangsa Tangut Thaana Tibetan Tifinagh Tirhuta
    Toto Ugaritic Vai Vithkuqi Wancho Warang_Citi Yezidi Yi Zanabazar_Square
""".split()  # noqa: SIM905 (a list of literals would be three times as long)


class UnicodeScripts(PiecePattern):
    """Cuts between characters of different scripts; kana and Chinese characters count as one, as Japanese mixes them.

    A space, like a character that has no script yet, belongs to what precedes it; at the begin of a text, where nothing
    does, it is left out. Digits and punctuation share the script "Common", combining accents have "Inherited".
    """

    def __init__(self) -> None:
        # The space and the mark for long vowels are common to several scripts, but not meant there.
        runs = [r"[\p{Script=Common}--[ \u30FC]][\p{Script=Common}\p{Script=Unknown}--\u30FC]*"]
        scripts = [rf"\p{{Script={script}}}" for script in SCRIPTS]
        for script in [*scripts[:1], r"\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\u30FC", *scripts[1:]]:
            runs.append(rf"[{script}][{script}\p{{Script=Unknown}} ]*")
        super().__init__(
            regex.compile("|".join(runs), regex.VERSION1).findall,
            re.compile(r"[A-Za-z][A-Za-z ]*|[^A-Za-z ][^A-Za-z]*").findall,
            r"[A-Za-z](?=[!-@])",
        )

    def to_json(self) -> dict[str, Any]:
        """Its part of a tokenizer.json."""
        return {"type": "UnicodeScripts"}
