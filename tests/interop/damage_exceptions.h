#pragma once
// Where our verdict on a damaged image is not QEMU's, and why.

#include <string_view>
#include <vector>

#include "interop/damaged_image.h"

namespace qcow::test {

struct Exception {
    std::string_view suite;
    std::string_view damage;  // a name, or the beginning of names and *
    Verdict peer;
    Verdict ours;
    std::string_view reason;
};

// clang-format off
inline const std::vector<Exception> exceptions = [] {
    using enum Verdict;
    constexpr std::string_view outside = "we do not open an image without an L1 table, or with one where none can be; QEMU does, to check";
    constexpr std::string_view no_refcounts = "QEMU opens no image whose refcount table is misplaced or too large; reading does not need it";
    constexpr std::string_view gives_up = "QEMU's check gives up, ours goes on and names what is wrong";
    constexpr std::string_view bitmaps = "QEMU reads bitmaps as it opens the image; we open it, and the check names what is wrong";
    constexpr std::string_view qemu_limit = "a limit of QEMU's, not of the format";
    constexpr std::string_view name = "QEMU takes a name to end at its first zero byte; a file's name has none";
    constexpr std::string_view no_cluster = "COPIED without a cluster says nothing; QEMU does not look at it";
    constexpr std::string_view overlap = "data and compressed data share a cluster with as many references as refcounts; QEMU only counts";
    constexpr std::string_view guest_offset = "in a data file the offset must be the guest's; QEMU does not look at it";
    constexpr std::string_view stale_bit = "the bit of the bitmaps without their extension: QEMU marks the image as corrupt only at the first write";
    return std::vector<Exception>{
        {"header", "version=0x2", leaks, corrupt, "version 2 has no zero clusters; QEMU reads them all the same"},
        {"header", "backing_offset=*", leaks, cannot_open, "a name, although an empty one, within the header"},
        {"header", "size=*", cannot_open, corrupt, bitmaps},
        {"header", "size=0x1", cannot_open, clean, "QEMU rounds the size down to sectors, and then the bitmap is too long"},
        {"header", "crypt_method=0x1", cannot_open, clean, "QEMU wants a key also for a check"},
        {"header", "l1_offset=*", corrupt, cannot_open, outside},
        {"header", "refcount_offset=*", cannot_open, corrupt, no_refcounts},
        {"header", "refcount_offset=*", check_fails, corrupt, gives_up},
        {"header", "refcount_clusters=*", cannot_open, corrupt, no_refcounts},
        {"header", "snapshot_count=*", check_fails, corrupt, gives_up},
        {"header", "snapshot_offset=*", check_fails, corrupt, gives_up},
        {"header 3", "autoclear=*", cannot_open, corrupt, "a raw data file without a data file: QEMU opens nothing, we say so in the check"},
        {"header 3", "header_length=*", leaks, cannot_open, "not a multiple of 8, as the format demands"},
        {"header 3", "extension_type=0xe2792aca", cannot_open, corrupt, "QEMU bounds the name of a format; no backing file has it here"},
        {"header 3", "extension_type=*", leaks, corrupt, stale_bit},
        {"header 3", "header_length=*", leaks, corrupt, stale_bit},
        {"header 2", "data.low_bit_0", clean, corrupt, "version 2 has no zero clusters; QEMU reads them all the same"},
        {"header 2", "data.only_copied", leaks, corrupt, no_cluster},
        {"header 2", "compressed.only_copied", leaks, corrupt, no_cluster},
        {"header 2", "compressed.compressed_flipped", clean, corrupt, overlap},
        {"backing", "backing_offset=*", clean, cannot_open, "a name within the header"},
        {"backing", "backing_size=*", clean, cannot_open, name},
        {"backing", "format_length=*", clean, cannot_open, name},
        {"backing", "format=0x0", clean, cannot_open, name},
        {"backing", "name=0x0", clean, cannot_open, name},
        {"L2", "own.only_copied", leaks, corrupt, no_cluster},
        {"L2", "shared.only_copied", leaks, corrupt, no_cluster},
        {"L2", "zero_kept.only_copied", leaks, corrupt, no_cluster},
        {"L2", "compressed.only_copied", leaks, corrupt, no_cluster},
        {"L2", "zero.copied_flipped", clean, corrupt, no_cluster},
        {"L2", "zero.only_copied", clean, corrupt, no_cluster},
        {"L2", "unallocated.copied_flipped", clean, corrupt, no_cluster},
        {"L2", "unallocated.only_copied", clean, corrupt, no_cluster},
        {"L2", "shared.compressed_flipped", clean, corrupt, overlap},
        {"L2", "compressed.compressed_flipped", clean, corrupt, overlap},
        {"refcount table", "first.*", check_fails, corrupt, gives_up},
        {"snapshots", "l1_offset=*", check_fails, corrupt, gives_up},
        {"snapshots", "l1_size=*", leaks, corrupt, "an L1 table too short for the snapshot's disk; QEMU does not look at it"},
        {"snapshots", "disk_size=*", clean, corrupt, "an L1 table too short for the snapshot's disk; QEMU does not look at it"},
        {"snapshots", "extra_length=*", check_fails, corrupt, gives_up},
        {"snapshots", "extra_length=*", check_fails, clean, qemu_limit},
        {"bitmaps", "count=*", cannot_open, corrupt, bitmaps},
        {"bitmaps", "reserved=*", cannot_open, corrupt, bitmaps},
        {"bitmaps", "directory_size=*", cannot_open, corrupt, bitmaps},
        {"bitmaps", "directory_offset=*", cannot_open, corrupt, bitmaps},
        {"bitmaps", "table_offset=*", cannot_open, corrupt, bitmaps},
        {"bitmaps", "table_size=*", cannot_open, corrupt, bitmaps},
        {"bitmaps", "flags=*", cannot_open, corrupt, bitmaps},
        {"bitmaps", "type=*", cannot_open, corrupt, bitmaps},
        {"bitmaps", "granularity_bits=*", cannot_open, corrupt, bitmaps},
        {"bitmaps", "name_length=*", cannot_open, corrupt, bitmaps},
        {"bitmaps", "extra_length=*", cannot_open, corrupt, bitmaps},
        {"bitmaps", "table.*", cannot_open, corrupt, bitmaps},
        {"extended L2", "data.low_bit_0", clean, corrupt, "bit 0 is reserved with extended entries; QEMU does not look at it"},
        {"extended L2", "partial.low_bit_0", clean, corrupt, "bit 0 is reserved with extended entries; QEMU does not look at it"},
        {"extended L2", "zero.low_bit_0", clean, corrupt, "bit 0 is reserved with extended entries; QEMU does not look at it"},
        {"extended L2", "unallocated.low_bit_0", clean, corrupt, "bit 0 is reserved with extended entries; QEMU does not look at it"},
        {"extended L2", "zero.*", clean, corrupt, no_cluster},
        {"extended L2", "unallocated.*", clean, corrupt, no_cluster},
        {"extended L2", "compressed.only_copied", leaks, corrupt, no_cluster},
        {"data file", "first.*", clean, corrupt, guest_offset},
        {"data file", "second.*", clean, corrupt, guest_offset},
        {"data file", "zero_kept.*", clean, corrupt, guest_offset},
        {"data file", "snapshot_count=*", corrupt, cannot_open, "the format excludes internal snapshots with a data file"},
        {"data file", "snapshot_count=*", check_fails, cannot_open, "the format excludes internal snapshots with a data file"},
        {"data file", "name_length=*", clean, cannot_open, name},
        {"truncated", "111", corrupt, cannot_open, outside},
        {"truncated", "*", cannot_open, corrupt, bitmaps},
    };
}();
// clang-format on

}  // namespace qcow::test
