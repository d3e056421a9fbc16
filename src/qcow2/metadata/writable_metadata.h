#pragma once
// The metadata of an image that is open for writing.

#include <functional>
#include <string>
#include <type_traits>

#include "base/group_commit.h"
#include "qcow/image.h"
#include "qcow2/metadata/allocator.h"
#include "qcow2/metadata/metadata_map.h"
#include "qcow2/metadata/write_back.h"

namespace qcow::qcow2 {

/// Owns all that changes the metadata of one image: the order of writes, the refcounts, the free clusters, and what is
/// known to be metadata. What a request changes, it changes by way of a Change.
///
/// Thread safety: all functions may be called from any number of threads, where they do not say otherwise.
class WritableMetadata {
public:
    /// `data_file` is flushed before the image file; null: there is none apart. Options: `cache`, `discard`.
    WritableMetadata(Metadata& metadata, Storage* data_file, const WriteOptions& options);

    // Opening. One thread.

    /// Reads what writing needs. Errors: Errc::corrupt, limit_exceeded, io.
    Result<void> load();
    /// Counts all references and compares them with the refcounts and the files' lengths. Errors: Errc::corrupt, marked
    /// in the image, where a write could destroy what it holds: see find_hazard().
    Result<void> verify_refcounts();
    /// Counts all references of an image that is marked as dirty. Errors: Errc::corrupt, io.
    Result<void> rebuild_refcounts() { return allocator_.rebuild(); }
    /// Repeats changes of the mapping that a killed process had in its cache alone. Afterwards the references have to
    /// be counted, and the image is marked as dirty if its version can be. `recounted`: they have been since it was
    /// opened. Nothing was changed since then, and no request is in flight. Errors: Errc::invalid_argument where the
    /// image is not as it was before these changes; io, corrupt.
    Result<void> redo(std::span<const RedoLog::Store> stores, bool recounted);
    /// Records changes of the mapping in this memory from now on: see WriteBack::record_in.
    void record_in(SurvivingMemory memory) { write_back_.record_in(std::move(memory)); }
    /// Takes the dirty mark away if the image is sound. Errors: Errc::corrupt, io.
    Result<void> end_rebuild();

    /// Does work that changes the image. Memory that runs out stops all writing: what is on disk is then as consistent
    /// as after a power loss.
    template <class Work>
    std::invoke_result_t<Work> attempt(Work&& work) {
        return write_back_.attempt(std::forward<Work>(work));
    }

    /// Errors: Errc::io, corrupt: why the image can no longer be written.
    [[nodiscard]] Result<void> verify_writable() const { return write_back_.verify_writable(); }

    /// Errors: Errc::corrupt where metadata lie in these bytes of the image file. The image is then marked.
    [[nodiscard]] Result<void> verify_no_metadata(HostOffset at, std::uint64_t length);

    /// Stops all writing, because of this error. Returns it.
    std::unexpected<Error> stop(Error why) { return write_back_.stop(std::move(why)); }

    /// Marks the image as corrupt on disk and stops all writing. Returns the error to report. `damage` names the file
    /// in its place; `place` is within the image file.
    std::unexpected<Error> declare_corrupt(Error damage, std::string_view remedy = "check it") {
        return write_back_.declare_corrupt(std::move(damage), remedy);
    }
    std::unexpected<Error> declare_corrupt(const std::string& place, const std::string& what) {
        return write_back_.declare_corrupt(place, what);
    }

    /// Changes the header, durably. Errors: Errc::io, no_space; a write that fails stops all writing.
    Result<void> change_header(const std::function<void(format::HeaderState&)>& change);

    /// Changes extensions of the header, too: see WriteBack::edit_header.
    Result<void> edit_header(const std::function<void(format::HeaderEdit&, format::HeaderState&)>& edit) {
        return write_back_.edit_header(edit);
    }

    /// Makes durable every change that was made before the call. Frees nothing.
    Result<void> write_changes();
    /// Makes durable what was written to the files; what is in the cache alone is not.
    Result<void> sync() { return write_back_.sync(); }

    /// Makes every change durable that was made before the call, then frees what was dropped. Errors: Errc::io stops
    /// all writing.
    Result<void> flush();
    /// Does so when much was dropped: it is free only after a flush, and somebody may never flush. The caller holds
    /// nothing.
    Result<void> flush_if_full();

    /// Counts one reference more to each cluster of the runs: to all, or to none if it fails. Errors:
    /// Errc::limit_exceeded: a refcount would become too large; corrupt, io, no_space.
    Result<void> add_references(std::span<const ClusterRun> runs) { return allocator_.add_references(runs); }
    /// Counts one reference less. Nothing on disk has it any more, and no request uses it. Errors: Errc::corrupt, io.
    Result<void> remove_reference(ClusterRun run, bool table) { return allocator_.release(run, table); }
    /// The refcount of each cluster of the run.
    Result<void> load_refcounts(ClusterRun run, std::span<std::uint64_t> counts) {
        return allocator_.load_refcounts(run, counts);
    }
    /// Returns when every request has ended that may use what was taken out of sight before the call.
    void wait_for_requests() { allocator_.wait_for_requests(); }
    /// Guards an L2 table that nothing active led to before.
    Result<void> protect_table(HostOffset at);

    /// Gives back what is reserved, and cuts what is free off the end of the file. No request may be in flight.
    Result<void> give_back() { return allocator_.give_back(); }

    /// Cuts the file behind the last cluster in use, and drops the refcount blocks that count nothing else. After
    /// give_back(). No request may be in flight, then or later.
    Result<void> cut_file();

    /// Requests that read hold one of these, so that nothing that they may be using is reused.
    Epochs& epochs() { return metadata_.epochs(); }

    [[nodiscard]] Metadata& metadata() { return metadata_; }
    [[nodiscard]] const Metadata& metadata() const { return metadata_; }

private:
    friend class Change;

    Metadata& metadata_;
    Storage* data_file_;
    MetadataMap map_;
    WriteBack write_back_;
    Allocator allocator_;
    GroupCommit group_;
};

}  // namespace qcow::qcow2
