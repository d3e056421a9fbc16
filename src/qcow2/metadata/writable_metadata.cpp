#include "qcow2/metadata/writable_metadata.h"

#include <fmt/format.h>

#include "base/try.h"
#include "qcow2/image_check.h"

namespace qcow::qcow2 {
namespace {

constexpr std::uint64_t max_retired_bytes = 256 * MiB;
constexpr std::size_t max_verify_bytes = 256 * MiB;
constexpr std::uint64_t small_file_bytes = 256 * MiB;  // not worth more than one thread to check
constexpr unsigned flushes_at_once = 4;                // file systems make one commit of them

}  // namespace

WritableMetadata::WritableMetadata(Metadata& metadata, Storage* data_file, const WriteOptions& options)
    : metadata_(metadata),
      data_file_(data_file),
      map_(metadata.header().cluster_bits),
      write_back_(metadata, data_file, options.cache != CacheMode::unsafe),
      allocator_(metadata, write_back_, map_, metadata.epochs(), options.discard),
      group_(flushes_at_once) {}

Result<void> WritableMetadata::load() {
    const auto state = metadata_.state();
    TRY_VOID(format::verify_refcount_table(state, metadata_.header().cluster_bits, TRY(metadata_.addressable_bytes())));
    if (metadata_.l1_left_out())
        TRY_VOID(metadata_.file().resize(state.l1_table.value + std::uint64_t{state.l1_entries} * 8));
    TRY_VOID(map_.load(metadata_));
    return allocator_.load();
}

Result<void> WritableMetadata::verify_refcounts() {
    CheckOptions options;
    options.memory_bytes = max_verify_bytes;
    options.workers = TRY(metadata_.file().size()) < small_file_bytes ? 1 : 0;
    auto hazard = find_hazard(metadata_, data_file_, options);
    if (!hazard) return hazard.error().code == Errc::limit_exceeded ? Result<void>() : std::unexpected(hazard.error());
    return *hazard ? declare_corrupt(std::move((*hazard)->damage), (*hazard)->remedy) : Result<void>();
}

Result<void> WritableMetadata::protect_table(HostOffset at) {
    const std::uint64_t bytes = metadata_.cluster_size();
    return map_.find(at, bytes).empty() ? map_.add(at, bytes, MetadataMap::Kind::l2_table) : Result<void>();
}

Result<void> WritableMetadata::end_rebuild() {
    TRY_VOID(write_changes());
    CheckOptions options;
    options.max_findings = 1;
    const auto report = TRY(check_image(metadata_, data_file_, options));
    if (report.corruptions != 0 || report.errors != 0) {
        return fail(Errc::corrupt, report.findings.front().place,
                    report.findings.front().what + "; this is left after the refcounts of a dirty image were rebuilt");
    }
    return change_header([](format::HeaderState& state) { state.incompatible &= ~format::incompatible::dirty; });
}

Result<void> WritableMetadata::verify_no_metadata(HostOffset at, std::uint64_t length) {
    const auto used = map_.find(at, length);
    if (used.empty()) return {};
    return declare_corrupt(fmt::format("host offset {:#x}", at.value),
                           fmt::format("guest data would be written over {}", used));
}

Result<void> WritableMetadata::change_header(const std::function<void(format::HeaderState&)>& change) {
    TRY_VOID(write_back_.update_header(change));
    return write_back_.sync();
}

Result<void> WritableMetadata::write_changes() {
    TRY_VOID(write_back_.write_all());
    return write_back_.sync();
}

Result<void> WritableMetadata::flush() {
    return group_.run([&] {
        return attempt([&]() -> Result<void> {
            auto retired = allocator_.begin_flush();
            auto flushed = write_changes();
            if (flushed) return allocator_.end_flush(std::move(retired));
            allocator_.flush_failed(std::move(retired));
            return flushed;
        });
    });
}

Result<void> WritableMetadata::flush_if_full() {
    return allocator_.retired_bytes() >= max_retired_bytes ? flush() : Result<void>();
}

}  // namespace qcow::qcow2
