#pragma once
// The job that tells how much space a new image needs.

#include <cstdint>
#include <optional>

#include "qcow/convert.h"

namespace qcow {

struct MeasureJob {
    /// The image to convert. If unset, an empty image of CreateOptions::size is measured.
    std::optional<ConvertJob::Source> source = {};
    Format format = Format::raw;  ///< of the new image: raw, qcow2 or luks
    /// Options of the new image. With a source, size 0 stands for the source's size. Names of files count for the
    /// header alone: the files are not opened.
    CreateOptions options = {};
};

/// The lengths of files, in bytes.
struct Measurement {
    /// The length of the image file that create() or convert() makes. convert() reads the data, and does not store
    /// clusters that hold only zeros, equal the backing file, or can be compressed: then this is an upper bound.
    std::uint64_t required = 0;
    /// The length of the image file once every byte of its disk has been written.
    std::uint64_t fully_allocated = 0;
    /// The space for copies of the source's bitmaps, if every bit of them has its place: an upper bound, since clusters
    /// of clean bits are not stored. Not part of `required`. Unset if there is no source with bitmaps that can be read,
    /// or the new image cannot have bitmaps.
    std::optional<std::uint64_t> bitmaps = {};
    /// The length of the data file. Unset if CreateOptions::data_file_name is empty.
    std::optional<std::uint64_t> data_file = {};
};

/// Measures the image that create() or convert() would make of the same options. Reads the source's mapping, and none
/// of its data. Memory does not grow with the image.
///
/// Progress is in bytes of the source. Uses `warn` for the source.
/// Errors: Errc::invalid_argument for options that exclude each other, and for a size smaller than the source's;
/// Errc::limit_exceeded if the image would be too large for its cluster size; Errc::cancelled; those of open_image.
/// Thread safety: may be called from any number of threads.
QCOW_API Result<Measurement> measure(const MeasureJob& job, const JobControl& control = {});

}  // namespace qcow
