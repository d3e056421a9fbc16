#pragma once
// The places in an image, and what can be wrong at them.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "format/entries.h"
#include "qcow/check.h"
#include "qcow/error.h"
#include "qcow/offset.h"

namespace qcow::qcow2 {

/// The structures of an image. Each takes whole host clusters, except for a bitmap, which is an entry of the directory,
/// and for compressed data.
enum class Structure : std::uint8_t {
    header,
    encryption_header,
    refcount_table,
    refcount_block,
    l1_table,
    l2_table,
    snapshot_table,
    bitmap_directory,
    bitmap,
    bitmap_table,
    bitmap_bits,
    data,
    compressed,
};

/// A structure, or one entry of it. The name is a view: it lives as long as the call that is given the place.
struct Place {
    Structure structure = Structure::header;
    HostOffset table = {};                    ///< where the structure begins; of a bitmap: where its table begins
    HostOffset at = {};                       ///< where the entry lies; without one, where the structure begins
    std::optional<std::uint64_t> index = {};  ///< of the entry; nothing: the structure as a whole
    std::optional<GuestOffset> guest = {};    ///< the first byte that an L2 entry maps
    std::optional<std::string_view> name =
        {};              ///< of the snapshot, the bitmap, or the header's field (index: its byte)
    bool active = true;  ///< false: an L2 table that only snapshots lead to
};

/// The place in words, for a message.
std::string text_of(const Place& place);

/// What contradicts the format at one place.
struct Flaw {
    enum class Kind : std::uint8_t {
        unusable,       // the target cannot be used; `reason` says why
        misaligned,     // the target does not begin at a cluster's beginning
        past_end,       // the target, or part of it, lies past the end of the file (`limit` bytes)
        overlap,        // the target overlaps other metadata, at host offset `limit`
        wrong_length,   // the target has a length that contradicts the rest; it should have `limit`
        too_long,       // the target is longer than a walk for the guard of metadata follows
        reserved_bits,  // the entry `word` has bits that mean nothing
        copied_flag,    // the entry `word` must not be marked COPIED, or must be
        contradiction,  // the entry `word` contradicts itself
        misplaced,      // the target does not lie where the guest's cluster has to lie in the data file
        duplicate,      // several bitmaps have this name
        // The header's field has the bit `word`, but the image does not have what the bit is about.
        stale_autoclear,
        refused_bitmap,  // QEMU refuses an image with this bitmap; `word` is not 0 if that can be corrected
        data_file_cut,   // the data file has `limit` bytes, and the disk `bytes`
    };
    Kind kind = Kind::unusable;
    Place place = {};
    Structure target = Structure::data;  ///< what the place leads to, or the structure itself
    HostOffset at = {};                  ///< where the target begins
    std::uint64_t bytes = 0;             ///< of the target
    std::uint64_t limit = 0;
    std::uint64_t word = 0;
    std::string_view detail = {};   ///< what is wrong with an L2 entry by itself; the name of the data file
    const Error* reason = nullptr;  ///< of what cannot be used
    std::uint64_t count = 1;        ///< for how many entries alike it stands
    /// References behind it were not visited: nobody can tell how often the clusters are used that they lead to.
    bool hides_references = false;
    bool in_data_file = false;  ///< the target lies in the external data file
};

/// The host offset that the flaw is about, by which findings are ordered: where an L1 or L2 entry lies that is wrong,
/// or where another structure, or a stream, is said to begin.
HostOffset subject_of(const Flaw& flaw);

CheckFinding::Severity severity_of(const Flaw& flaw);

/// The flaw as a finding, with its texts.
CheckFinding finding_of(const Flaw& flaw, unsigned cluster_bits);

}  // namespace qcow::qcow2
