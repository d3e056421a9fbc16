#pragma once
// Comparing the contents of two disks.

#include <cstdint>
#include <functional>
#include <optional>

#include "qcow/disk.h"
#include "qcow/image_spec.h"

namespace qcow {

/// A run of guest bytes in which two disks differ.
struct Difference {
    enum class Kind : std::uint8_t {
        contents,    ///< from the first byte that differs to the last one; every sector in between has one, too
        allocation,  ///< the disks store the run in different ways: see CompareOptions::strict
    };
    Kind kind = Kind::contents;
    GuestRange bytes;
};

/// What a comparison does, step by step.
enum class CompareStep : std::uint8_t {
    opening,  ///< opening the two images
    mapping,  ///< looking up where the bytes of a disk are stored
    reading,  ///< everything else
};

struct CompareOptions {
    /// Sizes and allocation must be the same, too. Allocation differs where one disk stores data, records zeros, or
    /// stores nothing, and the other one does not; and where only one of them has a place in a file for the bytes as
    /// they are (compressed data and most zeros have none).
    bool strict = false;
    /// Where set, the comparison goes on to the end of the disks and visits all differences, those of each kind in
    /// guest order. Neighbours are one difference. Otherwise the comparison ends with the first difference. Called by
    /// one thread at a time. An error that it returns ends the comparison.
    std::function<Result<void>(const Difference&)> visit = {};
    unsigned workers = 0;  ///< threads; 0: one a processor
    /// Where set, an error of the comparison leaves here the step that failed.
    CompareStep* failed_in = nullptr;
    JobControl control = {};  ///< progress is in guest bytes of the larger disk
};

struct Comparison {
    bool identical = false;
    std::uint64_t size_a = 0;  ///< bytes; a disk that ends within a sector goes on with zeros to the sector's end
    std::uint64_t size_b = 0;
    /// The difference with the lowest guest offset. None where only the sizes differ. Without CompareOptions::visit the
    /// disks may go on to differ behind its end.
    std::optional<Difference> first = {};
    std::uint64_t different_bytes = 0;  ///< whose values differ; counted only with CompareOptions::visit
};

/// Compares the contents of two disks, in parallel. Bytes that one disk has beyond the end of the other one are
/// compared with zeros. Holes and zeros are not read, nor is what both disks store at the same place of the same file.
///
/// The result does not depend on the number of workers. What cannot be read is an error, unless the comparison ended
/// with a difference before it. Memory: two pieces of 256 KiB or a block for each worker.
///
/// Errors: those of Disk::read, Disk::extent and `visit`; Errc::cancelled. Thread safety: as that of the disks. What is
/// written meanwhile may count as equal or different.
QCOW_API Result<Comparison> compare_disks(Disk& a, Disk& b, const CompareOptions& options = {});

struct CompareResult {
    Format format_a = Format::raw;
    Format format_b = Format::raw;
    Comparison comparison;
};

/// Opens two images and compares their contents. Nothing is written. Errors: those of open_image and compare_disks.
QCOW_API Result<CompareResult> compare(const ImageSpec& a, const ImageSpec& b, const CompareOptions& options = {});

}  // namespace qcow
