#pragma once
// Messages between the tool and its confined process: a length, and that many bytes. Numbers have eight bytes, texts a
// length in front.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "qcow/filesystem.h"

namespace tool::messages {

constexpr std::size_t longest_text = 65536;
/// The most contents of a file in one message.
constexpr std::size_t piece_bytes = std::size_t{1} << 20;

enum class Request : std::uint8_t {
    info,
    stat,
    list,
    lookup,
    read,
    extents,
    read_link,
    attributes,
    create,
    write,
    truncate,
    remove,
    replace,
    close
};

class Writer {
public:
    void number(std::uint64_t value) {
        const auto* const bytes = reinterpret_cast<const char*>(&value);
        bytes_.append(bytes, sizeof value);
    }
    void text(std::string_view value) {
        number(value.size());
        bytes_ += value;
    }
    void bytes(std::span<const std::byte> value) { text({reinterpret_cast<const char*>(value.data()), value.size()}); }
    void optional(const std::optional<std::uint64_t>& value) {
        number(value ? 1 : 0);
        number(value.value_or(0));
    }
    [[nodiscard]] const std::string& message() const { return bytes_; }

private:
    std::string bytes_;
};

/// Reads a message. What is missing or too long reads as nothing, and makes the message invalid.
class Reader {
public:
    explicit Reader(std::string bytes) : bytes_(std::move(bytes)) {}

    std::uint64_t number() {
        std::uint64_t value = 0;
        const auto part = take(sizeof value);
        if (part.size() == sizeof value) std::memcpy(&value, part.data(), sizeof value);
        return value;
    }
    /// A number of at most `most`.
    std::uint64_t number(std::uint64_t most) {
        const auto value = number();
        if (value > most) valid_ = false;
        return valid_ ? value : 0;
    }
    std::string_view text(std::size_t longest = longest_text) { return take(number(longest)); }
    std::span<const std::byte> bytes(std::size_t longest) {
        const auto found = text(longest);
        return std::as_bytes(std::span(found));
    }
    std::optional<std::uint64_t> optional() {
        const bool given = number(1) == 1;
        const auto value = number();
        return given ? std::optional(value) : std::nullopt;
    }
    /// How many elements follow, each of at least `least` bytes.
    std::size_t count(std::size_t most, std::size_t least) { return number(std::min(most, left() / least)); }

    /// Whether all was there, and nothing is left.
    [[nodiscard]] bool complete() const { return valid_ && left() == 0; }
    [[nodiscard]] bool valid() const { return valid_; }

private:
    std::string_view take(std::uint64_t length) {
        if (!valid_ || length > left()) {
            valid_ = false;
            return {};
        }
        const auto part = std::string_view(bytes_).substr(at_, length);
        at_ += length;
        return part;
    }

    [[nodiscard]] std::size_t left() const { return bytes_.size() - at_; }

    std::string bytes_;
    std::size_t at_ = 0;  // of what was not taken yet
    bool valid_ = true;
};

/// Returns false if the other process has gone.
bool send(int fd, const Writer& message);
/// Returns nothing if the other process has gone, or what it sent is no message.
std::optional<Reader> receive(int fd);

void put(Writer& to, const qcow::Error& error);
qcow::Error take_error(Reader& from);

void put(Writer& to, const qcow::FileInfo& info);
qcow::FileInfo take_info(Reader& from);
qcow::FileType take_type(Reader& from);

void put(Writer& to, const std::vector<qcow::Attribute>& attributes);
std::vector<qcow::Attribute> take_attributes(Reader& from);

}  // namespace tool::messages
