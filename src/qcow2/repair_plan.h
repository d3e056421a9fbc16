#pragma once
// What has to change in an image that a check found damaged: data, which somebody else turns into writes.

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "qcow/repair.h"
#include "qcow2/image_check.h"
#include "qcow2/new_clusters.h"
#include "qcow2/walker.h"

namespace qcow::qcow2 {

/// `count` entries of a table, from `at` on: the first gets `word`, and each further one `step` more.
struct EntryRun {
    HostOffset at = {};
    std::uint64_t entry_bytes = 8;
    std::uint64_t count = 1;
    std::uint64_t word = 0;
    std::uint64_t step = 0;
    std::optional<std::uint64_t> bitmap = {};  ///< the second word of an extended L2 entry; nothing: it stays
};

struct RepairPlan {
    // Entries that become well formed. They lead nowhere new, so they may be written at any time. Those that reveal
    // references come first: what lies in a cluster with several uses must not be corrected as if it had one.
    std::vector<EntryRun> bitmap_corrections;     ///< in tables of bitmaps
    std::vector<EntryRun> revealing_corrections;  ///< in L2 tables: which cluster an entry leads to is known then
    std::vector<EntryRun> corrections;            ///< in L1 and L2 tables
    std::vector<RepairLoss> losses;               ///< because of `corrections`
    std::uint64_t unlisted_losses = 0;

    // What a structure of more than one entry needs.
    bool bad_refcounts = false;          ///< the refcount table or its blocks cannot be used as they are
    bool bad_snapshot_table = false;     ///< entries of the snapshot table cannot be read
    std::set<HostOffset> bad_snapshots;  ///< that have these L1 tables
    bool bad_bitmap_directory = false;   ///< the bitmap directory cannot be read
    std::set<HostOffset> stale_bitmaps;  ///< whose tables begin there: bits are missing
    std::set<HostOffset> lost_bitmaps;   ///< whose tables begin there: the table cannot be used
    bool has_doubled_bitmaps = false;    ///< several bitmaps have the same name
    bool has_refused_bitmaps = false;    ///< QEMU refuses an image with these bitmaps
    std::uint64_t stale_autoclear = 0;   ///< bits of the header about what the image does not have

    /// A structure that shares a host cluster with another one.
    struct Table {
        Structure kind = Structure::l1_table;
        HostOffset at;
        std::uint64_t bytes = 0;
        bool of_snapshot = false;
        friend bool operator==(const Table&, const Table&) = default;
    };
    std::vector<Table> shared_tables;

    /// Clusters with several uses: one use moves to a copy.
    struct Copy {
        HostOffset from;
        HostOffset to;
        std::uint64_t bytes = 0;
        Structure what = Structure::data;
    };
    std::vector<Copy> copies;
    std::vector<EntryRun> pointers;  ///< entries that lead to the copies

    std::vector<EntryRun> marks;  ///< entries with a wrong COPIED flag, for the refcounts that there should be

    [[nodiscard]] bool corrects_structures() const {
        return !bitmap_corrections.empty() || bad_snapshot_table || !bad_snapshots.empty() || bad_bitmap_directory ||
               !stale_bitmaps.empty() || !lost_bitmaps.empty() || has_doubled_bitmaps || has_refused_bitmaps ||
               stale_autoclear != 0 || !shared_tables.empty();
    }
    [[nodiscard]] bool corrects_entries() const { return !revealing_corrections.empty() || !corrections.empty(); }
    [[nodiscard]] bool moves() const { return !pointers.empty(); }
};

/// Makes the plan for an image, by a second walk with the references of the first one. New clusters come from
/// `new_clusters`. Errors: those of walk(); limit_exceeded if the plan needs more memory than the options allow.
Result<RepairPlan> plan_repair(const Metadata& metadata, const Storage* data_file, const Diagnosis& diagnosis,
                               const RepairOptions& options, bool refcounts, NewClusters& new_clusters);

}  // namespace qcow::qcow2
