#include "filesystem/fat_directory.h"

#include <fmt/format.h>

#include <algorithm>

#include "qcow/text.h"

namespace qcow {
namespace {

using namespace fat;

constexpr std::size_t attributes_at = 11;
constexpr std::size_t sum_at = 13;

std::uint8_t attributes_of(std::span<const std::byte> entry) {
    return std::to_integer<std::uint8_t>(entry[attributes_at]) & 0x3f;
}

std::string short_name_of(std::span<const std::byte> entry) {
    return {reinterpret_cast<const char*>(entry.data()), attributes_at};
}

/// The short name as readers show it. Letters that are not ASCII depend on a code page that nobody recorded: they
/// become those of Latin-1, so that different names stay different.
std::string text_of_short_name(std::span<const std::byte> entry) {
    constexpr unsigned small_base = 0x08;
    constexpr unsigned small_ending = 0x10;
    const auto letters = [&](std::size_t begin, std::size_t length, unsigned small) {
        std::string text;
        const bool lower = (std::to_integer<unsigned>(entry[12]) & small) != 0;
        for (const auto byte : entry.subspan(begin, length)) {
            auto c = std::to_integer<std::uint8_t>(byte);
            if (begin == 0 && text.empty() && c == 0x05) c = 0xe5;  // 0xe5 marks removed entries
            if (lower && c >= 'A' && c <= 'Z') c = static_cast<std::uint8_t>(c - 'A' + 'a');
            if (c >= 0x80) text += static_cast<char>(0xc0 | c >> 6);
            text += static_cast<char>(c >= 0x80 ? 0x80 | (c & 0x3f) : c);
        }
        while (text.ends_with(' ')) text.pop_back();
        return text;
    };
    const auto base = letters(0, 8, small_base);
    const auto ending = letters(8, 3, small_ending);
    return ending.empty() ? base : fmt::format("{}.{}", base, ending);
}

}  // namespace

Result<void> FatDirectory::load(std::vector<std::byte> bytes, std::uint64_t sector) {
    bytes_ = std::move(bytes);
    sector_ = sector;
    LongName long_name;
    for (std::size_t slot = 0; slot < bytes_.size() / entry_bytes; ++slot) {
        const auto raw = entry(slot);
        if (raw[0] == end_mark) {
            // What follows means nothing, and must not when the mark moves.
            std::ranges::fill(std::span(bytes_).subspan(slot * entry_bytes), std::byte{0});
            break;
        }
        auto name = long_name.take(raw);
        // "." and ".." are no files, and neither are labels and entries of long names.
        if (raw[0] == removed_mark || raw[0] == std::byte{'.'} || (attributes_of(raw) & is_label) != 0) continue;
        if (name.empty()) name = text_of_short_name(raw);
        TRY_VOID(add_parsed(name, slot));
    }
    return {};
}

Result<void> FatDirectory::add_parsed(const std::string& name, std::size_t slot) {
    const auto sum = sum_of(entry(slot).first(attributes_at));
    const auto belongs = [&](std::size_t to) {
        const auto raw = entry(to);
        return raw[0] != removed_mark && attributes_of(raw) == is_long_name &&
               std::to_integer<std::uint8_t>(raw[sum_at]) == sum;
    };
    auto first = slot;
    while (first > 0 && belongs(first - 1)) --first;
    const auto key = folded(name);
    auto short_name = short_name_of(entry(slot));
    if (key && short_names_.take(short_name) && aliases_.emplace(short_name, *key).second &&
        files_.emplace(*key, File{name, short_name, first, slot}).second)
        return {};
    return fail(Errc::corrupt, printable(name, 64),
                "the directory has two files with this name; run fsck.fat before it is changed");
}

const FatDirectory::File* FatDirectory::find(const std::string& name) const {
    auto key = folded(name);
    if (!key) return nullptr;
    if (const auto found = files_.find(*key); found != files_.end()) return &found->second;
    const auto short_name = exact_short_name(upper(name));
    const auto alias = short_name ? aliases_.find(*short_name) : aliases_.end();
    return alias == aliases_.end() ? nullptr : &files_.at(alias->second);
}

std::span<std::byte> FatDirectory::change(std::size_t slot) {
    changed.insert(slot * entry_bytes / sector_);
    return std::span(bytes_).subspan(slot * entry_bytes, entry_bytes);
}

bool FatDirectory::is_free(std::size_t slot) const {
    const auto mark = bytes_[slot * entry_bytes];
    return mark == end_mark || mark == removed_mark;
}

std::optional<std::size_t> FatDirectory::room_for(std::size_t entries) {
    const auto slots = bytes_.size() / entry_bytes;
    while (first_free_ < slots && !is_free(first_free_)) ++first_free_;
    std::size_t free = 0;
    for (auto slot = first_free_; slot < slots; ++slot) {
        free = is_free(slot) ? free + 1 : 0;
        if (free == entries) return slot + 1 - entries;
    }
    return {};
}

const FatDirectory::File& FatDirectory::add(std::size_t at, const std::string& name, std::uint8_t attributes,
                                            std::uint32_t cluster, std::int64_t time, unsigned written) {
    std::vector<std::byte> entries;
    auto short_name = exact_short_name(name);
    if (short_name) {
        short_names_.take(*short_name);
    } else {
        short_name = short_names_.made(name);
        add_long_name(entries, name, *short_name);
    }
    add_entry(entries, *short_name, attributes, cluster, 0, time);
    const auto count = entries.size() / entry_bytes;
    for (std::size_t i = 0; i < count; ++i)
        std::ranges::copy(std::span(entries).subspan(i * entry_bytes, entry_bytes), change(at + i).begin());
    // The mark of the end moves here, and what was behind it may be anything on the disk.
    if (const auto next = at + count; next < bytes_.size() / entry_bytes && entry(next)[0] == end_mark) change(next);
    auto key = *folded(name);
    aliases_[*short_name] = key;
    return files_.insert_or_assign(std::move(key), File{name, *short_name, at, at + count - 1, written}).first->second;
}

void FatDirectory::remove(const File& file) {
    for (auto slot = file.first; slot <= file.slot; ++slot) change(slot)[0] = removed_mark;
    first_free_ = std::min(first_free_, file.first);
    short_names_.release(file.short_name);
    aliases_.erase(file.short_name);
    const auto key = *folded(file.name);
    files_.erase(key);
}

}  // namespace qcow
