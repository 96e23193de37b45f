"""DICOM files, written by pydicom and read as images."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fed.data import DataConfig, load_images
from smi_fed.data.decoding import check_header, read_image
from smi_fed.files import FileFormatError

pydicom = pytest.importorskip("pydicom")

CONFIG = DataConfig(source="folder", name="x", image_size=8, channels=1)
RAMP = np.arange(64).reshape(8, 8)


def write(path, values, kind="MONOCHROME2", bits=12, **tags):
    """A DICOM file of `values` (h, w) or (h, w, 3)."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = SecondaryCaptureImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Rows, file.Columns = values.shape[:2]
    file.SamplesPerPixel, file.PhotometricInterpretation = values.ndim * 2 - 3, kind
    if values.ndim == 3:
        file.PlanarConfiguration = 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 8 * values.itemsize, bits, bits - 1
    file.PixelRepresentation = int(values.dtype.kind == "i")
    file.PixelData = values.tobytes()
    for key, value in tags.items():
        setattr(file, key, value)
    file.save_as(path, enforce_file_format=True)
    return path


def test_grey_by_the_range_of_its_bits(tmp_path):
    values = (RAMP * 65).astype(np.uint16)
    found = read_image(write(tmp_path / "a.dcm", values), CONFIG)[0]
    torch.testing.assert_close(found, torch.tensor(values / 4095, dtype=torch.float32))
    turned = read_image(write(tmp_path / "b.dcm", values, "MONOCHROME1"), CONFIG)[0]
    torch.testing.assert_close(turned, 1 - found)
    signed = read_image(write(tmp_path / "c.dcm", (values.astype(np.int16) - 2048)), CONFIG)[0]
    torch.testing.assert_close(signed, found)


def test_rescaling_and_window(tmp_path):
    """A CT's window of 400 around 40 Hounsfield units: by hand, from the standard's linear function."""
    units = RAMP * 20 - 400
    stored = (units + 1024).astype(np.uint16)
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    found = read_image(write(tmp_path / "ct.dcm", stored, **tags), CONFIG)[0]
    expected = ((units - 39.5) / 399 + 0.5).clip(0, 1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)


def test_colour_and_frames(tmp_path):
    colour = np.tile(np.array([200, 100, 50], np.uint8), (8, 8, 1))
    found = read_image(write(tmp_path / "a.dcm", colour, "RGB", 8), DataConfig(channels=3, image_size=8))
    torch.testing.assert_close(found.mean((1, 2)), torch.tensor([200, 100, 50]) / 255)
    frames = np.stack([np.full((8, 8), 4095), np.zeros((8, 8))]).astype(np.uint16)
    path = write(tmp_path / "b.dcm", frames[0], NumberOfFrames=2, PixelData=frames.tobytes())
    assert float(read_image(path, CONFIG).min()) == 1


def test_a_folder_of_them_in_either_case(tmp_path):
    for name, value in (("ill", 0), ("well", 4095)):
        (tmp_path / name).mkdir()
        for number, ending in enumerate((".dcm", ".DCM")):
            write(tmp_path / name / f"{number}{ending}", np.full((9, 9), value, np.uint16))
    train, _ = load_images(DataConfig(source="folder", name=str(tmp_path), image_size=8, test_fraction=0.5))
    assert [float(image.mean()) for image in train.images] == [float(label) for label in train.labels]


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    bad = tmp_path / "bad.dcm"
    bad.write_text("no DICOM")
    for read in (lambda: read_image(bad, CONFIG), lambda: check_header(bad)):
        with pytest.raises(FileFormatError, match="bad.dcm: not a readable image .InvalidDicomError"):
            read()
    good = write(tmp_path / "good.dcm", RAMP.astype(np.uint16))
    check_header(good)
    good.write_bytes(good.read_bytes()[:-40])
    check_header(good)
    with pytest.raises(FileFormatError, match="good.dcm: not a readable image"):
        read_image(good, CONFIG)
    odd = write(tmp_path / "odd.dcm", RAMP.astype(np.uint8), "PALETTE COLOR", 8)
    with pytest.raises(FileFormatError, match="odd.dcm: its pixels are PALETTE COLOR, allowed: MONOCHROME1"):
        read_image(odd, CONFIG)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(FileFormatError, match=r"good.dcm: DICOM is read by pydicom, pip install 'smi-fed\[dicom\]'"):
        read_image(good, CONFIG)
    Image.new("L", (4, 4)).save(tmp_path / "plain.png")
    assert read_image(tmp_path / "plain.png", CONFIG).shape == (1, 8, 8)
