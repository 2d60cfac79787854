"""The .beton file format and its sidecar of facts: written, checked and read without FFCV.

A .beton file is what FFCV 1.0.2 reads: here always one ``RGBImageField`` named "image" and one ``IntField``
named "label", all images of one size and one encoding.

    header            version, number of fields, page size, number of samples, where the allocation table starts
    two descriptors   type and name of each field, 1024 bytes of arguments that FFCV's two fields ignore
    metadata          per sample: encoding, width, height, where its bytes start, label
    pages             the samples' bytes; no sample crosses a page
    allocation table  per sample: its index, where its bytes start, how many they are

FFCV trusts all of it: damaged tables make it crash, hang, or return wrong pixels. What the format has no room for
(class names, channel statistics, source) stands in a JSON file beside it, ``FILE.beton.json``, read into ``Facts``.
Two checksums stand there too: of the tables, which ``check`` compares before FFCV sees the file, and of the content,
which ``verify`` compares as well.
"""

from simclr.beton.facts import About, BetonError, Facts, load_facts, sidecar_path
from simclr.beton.format import Encoding
from simclr.beton.reading import Layout, check, describe, image_digests, read, verify
from simclr.beton.writing import Writer, encode_jpeg, save_facts, write

__all__ = [
    "About",
    "BetonError",
    "Encoding",
    "Facts",
    "Layout",
    "Writer",
    "check",
    "describe",
    "encode_jpeg",
    "image_digests",
    "load_facts",
    "read",
    "save_facts",
    "sidecar_path",
    "verify",
    "write",
]
