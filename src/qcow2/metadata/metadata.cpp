#include "qcow2/metadata/metadata.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/bits.h"
#include "base/try.h"
#include "qcow2/metadata/file_end.h"

namespace qcow::qcow2 {
namespace {

constexpr std::uint64_t max_page_bytes = 4096;

format::EntryRules rules_of(const format::Header& header) {
    return {format::Geometry(header), header.version, header.has(format::incompatible::external_data)};
}

}  // namespace

Metadata::Metadata(const format::Header& header, std::shared_ptr<Storage> file, std::size_t cache_bytes)
    : header_(header),
      rules_(rules_of(header)),
      file_(std::move(file)),
      cache_bytes_(cache_bytes),
      words_(file_, std::min(header_.cluster_size(), max_page_bytes), cache_bytes),
      state_(header),
      active_l1_(header.l1_table.value),
      disk_size_(header.size) {
    // Whether the L1 table was cut off, or left out by its writer: then it is all zeros, and no data are counted.
    const auto file_size = file_->size();
    if (!file_size) return;
    const std::uint64_t l1_end = state_.l1_table.value + std::uint64_t{state_.l1_entries} * 8;
    const std::uint64_t file_end = divide_up(*file_size, cluster_size()) * cluster_size();
    if (l1_end <= *file_size || state_.l1_table.value > file_end) return;
    l1_left_out_ = counts_no_data(*file_, header_, state_).value_or(false);
}

void Metadata::replace_state(const format::HeaderState& state) {
    const std::lock_guard lock(state_mutex_);
    state_ = state;
    active_l1_.store(state.l1_table.value, std::memory_order_release);
}

Result<std::uint64_t> Metadata::addressable_bytes() const {
    return std::min(geometry().clusters(TRY(file_->size())) * cluster_size(), format::max_host_offset);
}

Result<bool> Metadata::is_in_file(HostOffset at, std::uint64_t bytes) const {
    if (lies_within(at.value, bytes, known_file_size_.load(std::memory_order_relaxed))) return true;
    const auto file_size = std::min(TRY(file_->size()), format::max_host_offset);
    known_file_size_.store(file_size, std::memory_order_relaxed);
    return lies_within(at.value, bytes, file_size);
}

std::optional<std::uint64_t> Metadata::counted_end() const {
    std::call_once(counted_end_once_, [&] {
        if (const auto found = find_counted_end(*file_, header_, state())) counted_end_ = *found;
    });
    return counted_end_;
}

std::string Metadata::past_the_end(const Storage& file, std::string_view thing, HostOffset at) const {
    const auto file_size = file.size().value_or(0);
    auto text = fmt::format("{} would lie at host offset {:#x}, past the end of the file ({} bytes): the file was cut",
                            thing, at.value, file_size);
    if (&file != file_.get()) return text;
    const auto counted = counted_end();
    if (counted && *counted > file_size) {
        text += fmt::format(", the complete one has about {} bytes", *counted);
    } else if (counted) {
        text += ", or what leads there is damaged";
    }
    return text;
}

}  // namespace qcow::qcow2
