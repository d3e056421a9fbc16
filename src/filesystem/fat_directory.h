#pragma once
// A directory of a FAT file system, in memory.

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/try.h"
#include "filesystem/fat_format.h"

namespace qcow {

/// The entries of a directory, and the files that they name. Changes stay in memory; `changed` says where they are.
class FatDirectory {
public:
    struct File {
        std::string name;
        std::string short_name;  // eleven bytes
        std::size_t first = 0;   // the number of its first entry, which may be one of a long name
        std::size_t slot = 0;    // of the entry that says where the file lies
        unsigned written = 0;    // how often the directories had been written when the file was made
    };

    /// Parses the bytes of a directory. Errors: Errc::corrupt: two files have the same name.
    Result<void> load(std::vector<std::byte> bytes, std::uint64_t sector);

    [[nodiscard]] const std::map<std::u16string, File>& files() const { return files_; }
    /// The file with this name or short name; null if there is none.
    [[nodiscard]] const File* find(const std::string& name) const;

    /// The entry at a slot.
    [[nodiscard]] std::span<const std::byte> entry(std::size_t slot) const {
        return std::span(bytes_).subspan(slot * fat::entry_bytes, fat::entry_bytes);
    }
    /// The same, to change it.
    std::span<std::byte> change(std::size_t slot);

    /// Where so many free entries lie one behind the other; none: the directory must be longer.
    [[nodiscard]] std::optional<std::size_t> room_for(std::size_t entries);
    /// Appends free entries.
    void grow(std::uint64_t bytes) { bytes_.resize(bytes_.size() + bytes); }
    [[nodiscard]] std::uint64_t size() const { return bytes_.size(); }

    /// Adds a file, for whose entries there must be room at `at`. `time`: seconds since 1970.
    const File& add(std::size_t at, const std::string& name, std::uint8_t attributes, std::uint32_t cluster,
                    std::int64_t time, unsigned written);
    void remove(const File& file);

    /// The sectors of the directory that changed, by their numbers. The caller clears it.
    std::set<std::size_t> changed;

    [[nodiscard]] std::span<const std::byte> sector(std::size_t number) const {
        return std::span(bytes_).subspan(number * sector_, sector_);
    }

private:
    [[nodiscard]] bool is_free(std::size_t slot) const;
    Result<void> add_parsed(const std::string& name, std::size_t slot);

    std::vector<std::byte> bytes_;
    std::uint64_t sector_ = 512;
    std::size_t first_free_ = 0;                     // no slot in front of it is free
    std::map<std::u16string, File> files_;           // by their folded names
    std::map<std::string, std::u16string> aliases_;  // from short to folded names
    fat::ShortNames short_names_;
};

}  // namespace qcow
