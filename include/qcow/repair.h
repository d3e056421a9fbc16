#pragma once
// Repairing the metadata of a qcow2 image.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "qcow/check.h"
#include "qcow/image_spec.h"
#include "qcow/job.h"
#include "qcow/offset.h"

namespace qcow {

/// Something that a repair cannot keep, because the damage has destroyed it or the way to it.
struct RepairLoss {
    enum class What : std::uint8_t {
        guest_data,  ///< guest bytes whose place in the file is lost
        snapshot,    ///< an internal snapshot: the repair removes it
        bitmap,      ///< the bits of a bitmap: the repair marks it as inconsistent, or removes it
    };
    What what = What::guest_data;
    std::string name = {};        ///< of the snapshot or bitmap; empty if the damage hides it
    GuestOffset guest = {};       ///< guest_data: the first byte
    std::uint64_t length = 0;     ///< guest_data: bytes
    bool in_snapshots = false;    ///< guest_data: only snapshots hold it, the active disk does not
    bool reads_as_zeros = false;  ///< guest_data: false: the contents of the backing file show
    std::string why = {};         ///< place and damage, for people
};

/// One line about a loss, for people.
QCOW_API std::string text_of(const RepairLoss& loss);

struct RepairOptions {
    enum class What : std::uint8_t {
        leaks,  ///< give leaked clusters back, and change nothing else
        all,    ///< repair everything that can be repaired
    };
    What what = What::all;
    bool dry_run = false;  ///< find out what a repair would do, and write nothing
    /// Remove the bitmaps that are marked as inconsistent ("in use") after the repair. Otherwise they stay, so that
    /// their names and granularities are known. Only for What::all.
    bool remove_inconsistent_bitmaps = false;
    unsigned workers = 0;  ///< threads; 0: one per processor
    /// Each report lists at most so many findings, and the result lists at most so many losses.
    std::size_t max_findings = 1000;
    /// Memory budget, for the references (see CheckOptions::memory_bytes, taken twice) and for the changes.
    std::size_t memory_bytes = std::size_t{1} << 30;
    /// Receives each loss that RepairResult::losses lists, before anything is written. Called on the caller's thread. A
    /// caller that does not accept a loss requests a stop: the repair then fails with Errc::cancelled.
    std::function<void(const RepairLoss&)> on_loss = {};
    JobControl control = {};  ///< progress starts from zero for each pass over the metadata, and for the writing
};

struct RepairResult {
    CheckReport before;
    /// Of the repaired image; of a dry run: as the repair would leave it. What could not be repaired is among its
    /// findings.
    CheckReport after;
    std::uint64_t leaks_fixed = 0;        ///< host clusters
    std::uint64_t corruptions_fixed = 0;  ///< findings of severity `corruption` and `error`
    std::uint64_t postponed_fixed = 0;    ///< postponed refcounts and COPIED flags
    std::vector<RepairLoss> losses;
    std::uint64_t unlisted_losses = 0;  ///< more than RepairOptions::max_findings
    std::uint64_t copied_clusters = 0;  ///< host clusters that were copied to a place of their own
    /// Names of the bitmaps that were removed because of RepairOptions::remove_inconsistent_bitmaps.
    std::vector<std::string> removed_bitmaps;
    bool refcounts_rebuilt = false;  ///< the refcount table and its blocks were rebuilt
    bool changed = false;            ///< the image was changed; of a dry run: it would be

    // Marks of the header that the repair cleared, because the repaired image has no damage.
    [[nodiscard]] bool cleared_dirty() const { return before.dirty && !after.dirty; }
    [[nodiscard]] bool cleared_corrupt() const { return before.marked_corrupt && !after.marked_corrupt; }
};

/// Repairs a qcow2 image in place. The backing file is not opened. An external data file is opened for reading, and its
/// length is compared with the metadata.
///
/// The job plans all changes before it writes any. It then writes them in an order that is safe: the process may die
/// and the power may fail at any moment, and running the job again completes the repair. While a repair is incomplete,
/// the image has the corrupt bit (version 3), so that nobody writes to it. The job reserves all space that it needs
/// before its first write. A job that fails clears the corrupt bit that it has set.
///
/// The dirty and corrupt bits are cleared at the end, if no corruption is left, whatever RepairOptions::what is.
///
/// New clusters lie in free clusters of the file where the check knows these, and else at the end of the file. Once
/// data are lost, all lie at the end, if the file can grow: what was lost may then still be found in the file.
///
/// Data that are encrypted with LUKS depend on their place in the file. They are decrypted and encrypted again as they
/// get another one, with the key of the image. ImageSpec::keys is asked for it only then, and never in a dry run.
///
/// Errors: Errc::encrypted if that key is missing or wrong, with the image as it was;
/// Errc::invalid_argument for remove_inconsistent_bitmaps with What::leaks; Errc::no_space, with the image as
/// it was, if there is no room for what the repair adds (a dry run knows only of the room on a block device);
/// Errc::unsupported for formats other than qcow2; Errc::locked if another process uses the image;
/// Errc::read_only, access_denied; Errc::corrupt if the header cannot be used; Errc::limit_exceeded if
/// RepairOptions::memory_bytes is too small; Errc::cancelled; Errc::io.
/// Thread safety: jobs may run at the same time. What one writes, another must not use.
QCOW_API Result<RepairResult> repair(const ImageSpec& spec, const RepairOptions& options = {});

}  // namespace qcow
