#include "format/header_edit.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/bits.h"
#include "base/endian.h"
#include "base/try.h"

namespace qcow::format {
namespace {

constexpr std::size_t name_offset_field = 8;
constexpr std::size_t name_length_field = 16;
constexpr std::size_t refcount_order_field = 96;
constexpr std::size_t header_length_field = 100;
constexpr std::size_t compression_field = 104;
constexpr unsigned refcount_order_v2 = 4;
constexpr std::size_t record_header = 8;
/// Behind it no reader looks at fields, as long as these are not named by a feature bit.
constexpr std::size_t known_fields = 112;

constexpr std::size_t aligned(std::size_t bytes, std::size_t alignment) {
    return align_down(bytes + alignment - 1, alignment);
}

std::vector<std::byte> record(std::uint32_t type, std::span<const std::byte> data) {
    std::vector<std::byte> bytes(record_header + aligned(data.size(), 8));
    store_be(bytes, 0, type);
    store_be(bytes, 4, static_cast<std::uint32_t>(data.size()));
    std::ranges::copy(data, bytes.begin() + record_header);
    return bytes;
}

}  // namespace

HeaderEdit::HeaderEdit(std::span<const std::byte> cluster)
    : before_(cluster.begin(), cluster.end()), cluster_size_(bit(load_be<std::uint32_t>(cluster, 20))) {
    const auto version = load_be<std::uint32_t>(cluster, 4);
    const std::size_t length = version < 3 ? fixed_header_v2 : load_be<std::uint32_t>(cluster, header_length_field);
    fields_.assign(cluster.begin(), cluster.begin() + static_cast<std::ptrdiff_t>(length));
    const auto name_offset = static_cast<std::size_t>(load_be<std::uint64_t>(cluster, name_offset_field));
    std::size_t limit = cluster.size();
    end_ = length;
    if (name_offset != 0) {
        const auto name = cluster.subspan(name_offset, load_be<std::uint32_t>(cluster, name_length_field));
        name_.assign(name.begin(), name.end());
        limit = name_offset;
        end_ = name_offset + name.size();
    }
    for (std::size_t at = length; at < limit && record_header <= cluster.size() - at;) {
        const auto type = load_be<std::uint32_t>(cluster, at);
        const std::size_t bytes = record_header + aligned(load_be<std::uint32_t>(cluster, at + 4), 8);
        const bool ends = static_cast<ExtensionType>(type) == ExtensionType::end;
        const auto whole = cluster.subspan(at, std::min(bytes, limit - at));
        if (!ends) records_.push_back({type, {whole.begin(), whole.end()}});
        at += ends ? record_header : whole.size();
        end_ = std::max(end_, std::min(at, limit));
        if (ends) break;
    }
    for (auto& [type, bytes] : records_) bytes.resize(aligned(bytes.size(), 8));
    before_.resize(aligned(before_.size(), sector_bytes));
}

void HeaderEdit::set_state(const HeaderState& state) {
    update_header(fields_, load_be<std::uint32_t>(fields_, 4), state);
}

void HeaderEdit::set_version(unsigned version) {
    const bool is_new = load_be<std::uint32_t>(fields_, 4) < 3 && version >= 3;
    fields_.resize(version < 3 ? fixed_header_v2 : std::max(fields_.size(), known_fields));
    store_be(fields_, 4, std::uint32_t{version});
    if (is_new) set_refcount_order(refcount_order_v2);
}

void HeaderEdit::set_refcount_order(unsigned order) { store_be(fields_, refcount_order_field, std::uint32_t{order}); }

void HeaderEdit::set_compression(Compression compression) {
    fields_.resize(std::max(fields_.size(), known_fields));
    fields_[compression_field] = static_cast<std::byte>(compression);
}

void HeaderEdit::set_extension(ExtensionType type, std::span<const std::byte> data) {
    const auto number = static_cast<std::uint32_t>(type);
    const auto first = std::ranges::find(records_, number, &Record::type);
    if (first == records_.end()) {
        records_.push_back({number, record(number, data)});
        return;
    }
    first->bytes = record(number, data);
    const auto others = std::ranges::remove(first + 1, records_.end(), number, &Record::type);
    records_.erase(others.begin(), others.end());
}

void HeaderEdit::remove_extension(ExtensionType type) {
    std::erase_if(records_, [&](const Record& record) { return record.type == static_cast<std::uint32_t>(type); });
}

void HeaderEdit::set_backing_name(std::string_view name) {
    const auto bytes = as_bytes(name);
    name_.assign(bytes.begin(), bytes.end());
}

/// The extensions, their end, and the name. The names of features are for people: without room, they are left out.
std::vector<std::byte> HeaderEdit::tail() const {
    const auto with = [&](bool feature_names) {
        std::vector<std::byte> bytes;
        for (const auto& record : records_) {
            if (feature_names || record.type != static_cast<std::uint32_t>(ExtensionType::feature_names))
                bytes.insert(bytes.end(), record.bytes.begin(), record.bytes.end());
        }
        bytes.resize(bytes.size() + record_header);
        bytes.insert(bytes.end(), name_.begin(), name_.end());
        return bytes;
    };
    auto bytes = with(true);
    return fields_.size() + bytes.size() <= cluster_size_ ? bytes : with(false);
}

/// Makes the fields of `cluster` lead to a tail that lies at `at`, and have all that was changed.
void HeaderEdit::lead_to_tail(std::span<std::byte> cluster, std::size_t at) const {
    std::ranges::copy(fields_, cluster.begin());
    if (load_be<std::uint32_t>(fields_, 4) >= 3) store_be(cluster, header_length_field, static_cast<std::uint32_t>(at));
    const std::size_t name_offset = at + tail().size() - name_.size();
    store_be(cluster, name_offset_field, std::uint64_t{name_.empty() ? 0 : name_offset});
    store_be(cluster, name_length_field, static_cast<std::uint32_t>(name_.size()));
}

Result<std::vector<std::vector<std::byte>>> HeaderEdit::steps() const {
    const auto bytes = tail();
    const std::size_t home = fields_.size();
    const std::size_t end = home + bytes.size();
    if (end > cluster_size_ || name_.size() > max_name_length) {
        return fail(Errc::limit_exceeded, "header",
                    fmt::format("with the names that it is to hold it takes {} bytes, more than a cluster of {}", end,
                                cluster_size_));
    }
    const auto copy_tail = [&](std::vector<std::byte>& cluster, std::size_t at) {
        std::ranges::copy(bytes, cluster.begin() + static_cast<std::ptrdiff_t>(at));
    };
    // Another place for the tail, which overlaps neither where it is nor where it is to be.
    const std::size_t away = aligned(std::max(end_, end), 8);
    const std::size_t away_end = away + bytes.size();

    auto last = before_;
    last.resize(std::max(last.size(), aligned(end, sector_bytes)));
    if (end_ > end) std::ranges::fill(std::span(last).subspan(end, end_ - end), std::byte{0});
    copy_tail(last, home);
    lead_to_tail(last, home);
    auto first = before_;
    first.resize(last.size());
    if (first == last) return std::vector<std::vector<std::byte>>{};
    const bool one_sector =
        std::ranges::equal(std::span(first).subspan(sector_bytes), std::span(last).subspan(sector_bytes));
    if (one_sector || home < known_fields || away_end > cluster_size_) return std::vector<std::vector<std::byte>>{last};

    // The length of the header says where the tail begins: it leads away and back again.
    std::vector<std::vector<std::byte>> steps(1, before_);
    steps[0].resize(std::max(last.size(), aligned(away_end, sector_bytes)));
    copy_tail(steps[0], away);
    steps.push_back(steps.back());
    lead_to_tail(steps.back(), away);
    steps.push_back(steps.back());
    std::copy(last.begin() + static_cast<std::ptrdiff_t>(home), last.begin() + static_cast<std::ptrdiff_t>(away),
              steps.back().begin() + static_cast<std::ptrdiff_t>(home));
    steps.push_back(steps.back());
    lead_to_tail(steps.back(), home);
    steps.push_back(std::move(last));
    steps.back().resize(steps[0].size());
    std::copy(before_.begin() + static_cast<std::ptrdiff_t>(std::min(before_.size(), away)), before_.end(),
              steps.back().begin() + static_cast<std::ptrdiff_t>(std::min(before_.size(), away)));
    return steps;
}

}  // namespace qcow::format
