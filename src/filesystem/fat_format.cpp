#include "filesystem/fat_format.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <string_view>

#include "filesystem/little_endian.h"
#include "filesystem/names.h"
#include "qcow/text.h"

namespace qcow::fat {

std::pair<std::uint64_t, std::uint64_t> cluster_limits(unsigned bits) {
    if (bits == 12) return {1, 4084};
    if (bits == 16) return {4085, 65524};
    return {65525, 0x0ffffff4};
}

// ---- Links ----

std::uint32_t end_of_chain(unsigned bits) { return bits == 12 ? 0xfff : bits == 16 ? 0xffff : 0x0fffffff; }

std::uint32_t load_link(std::span<const std::byte> table, std::size_t index, unsigned bits) {
    if (bits == 32) return load_le<std::uint32_t>(table, index * 4) & 0x0fffffff;
    if (bits == 16) return load_le<std::uint16_t>(table, index * 2);
    const unsigned pair = load_le<std::uint16_t>(table, index * 3 / 2);
    return index % 2 == 0 ? pair & 0xfff : pair >> 4;
}

void store_link(std::span<std::byte> table, std::size_t index, unsigned bits, std::uint32_t value) {
    if (bits == 32) return store_le(table, index * 4, (load_le<std::uint32_t>(table, index * 4) & 0xf0000000) | value);
    if (bits == 16) return store_le(table, index * 2, static_cast<std::uint16_t>(value));
    const unsigned pair = load_le<std::uint16_t>(table, index * 3 / 2);
    const auto changed = index % 2 == 0 ? (pair & 0xf000) | value : (pair & 0xf) | value << 4;
    store_le(table, index * 3 / 2, static_cast<std::uint16_t>(changed));
}

// ---- Names ----

namespace {

constexpr std::size_t most_units = 255;  // of a long name, in UTF-16
constexpr std::size_t units_in_entry = 13;

char capital(char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; }

bool is_short_character(char c) {
    return (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || std::string_view("!#$%&'()-@^_`{}~").contains(c);
}

/// The part of a name that its short name begins with, and the one behind the dot.
std::pair<std::string, std::string> short_parts(const std::string& name) {
    const auto dot = name.rfind('.');
    const auto cleaned = [](std::string_view text, std::size_t most) {
        std::string result;
        for (const char c : text) {
            if (c == ' ' || c == '.' || (static_cast<std::uint8_t>(c) & 0xc0) == 0x80) continue;
            result += is_short_character(capital(c)) ? capital(c) : '_';
            if (result.size() == most) break;
        }
        return result;
    };
    const bool has_ending = dot != std::string::npos && dot != 0;
    auto base = cleaned(std::string_view(name).substr(0, has_ending ? dot : std::string::npos), 8);
    if (base.empty()) base = "_";
    return {base, has_ending ? cleaned(std::string_view(name).substr(dot + 1), 3) : std::string()};
}

/// The capital letter of a small one, as readers of FAT compare names: of Latin, Greek, Cyrillic and Armenian.
char16_t capital(char16_t c) {
    const auto within = [c](char16_t first, char16_t last) { return c >= first && c <= last; };
    const auto minus = [c](int distance) { return static_cast<char16_t>(c - distance); };
    if (within(u'a', u'z') || (within(0xe0, 0xfe) && c != 0xf7) || within(0x3b1, 0x3c1) || within(0x3c3, 0x3cb) ||
        within(0x430, 0x44f))
        return minus(0x20);
    if (c == 0xff) return 0x178;
    if (within(0x450, 0x45f)) return minus(0x50);
    if (within(0x561, 0x586)) return minus(0x30);
    // Here, capital and small letters alternate.
    const bool odd = (c & 1) != 0;
    if (odd && ((within(0x100, 0x137) && c != 0x131) || within(0x14a, 0x177) || within(0x460, 0x481) ||
                within(0x48a, 0x4bf) || within(0x4d0, 0x52f) || within(0x1e00, 0x1e95) || within(0x1ea0, 0x1eff)))
        return minus(1);
    if (!odd && (within(0x139, 0x148) || within(0x179, 0x17e) || within(0x4c1, 0x4ce))) return minus(1);
    return c;
}

/// Whether DOS, Windows and Linux take the name for a device: "con", "AUX.txt", "lpt1".
bool is_device_name(const std::string& name) {
    auto base = upper(name.substr(0, name.find('.')));
    while (base.ends_with(' ')) base.pop_back();
    constexpr auto devices = std::to_array<std::string_view>({"AUX", "CON", "NUL", "PRN"});
    if (std::ranges::find(devices, base) != devices.end()) return true;
    return base.size() == 4 && (base.starts_with("COM") || base.starts_with("LPT")) && base[3] >= '1' && base[3] <= '9';
}

}  // namespace

std::string upper(std::string text) {
    for (auto& c : text) c = capital(c);
    return text;
}

std::optional<std::string> exact_short_name(const std::string& name) {
    const auto dot = name.find('.');
    const auto base = name.substr(0, dot);
    const auto ending = dot == std::string::npos ? std::string() : name.substr(dot + 1);
    if (base.empty() || base.size() > 8 || ending.size() > 3 || (dot != std::string::npos && ending.empty())) return {};
    if (!std::ranges::all_of(base + ending, is_short_character)) return {};
    return fmt::format("{:<8}{:<3}", base, ending);
}

std::string flaw_of(const std::string& name) {
    for (const char c : name) {
        if (static_cast<std::uint8_t>(c) < 0x20 || std::string_view("\"*:<>?\\|").contains(c) || c == 0x7f)
            return fmt::format("FAT has no names with the character \"{}\"", printable({&c, 1}));
    }
    if (name.ends_with('.') || name.ends_with(' ')) return "FAT has no names that end with a dot or a blank";
    const auto units = utf16(name);
    if (!units) return "the name is no valid UTF-8, as FAT requires";
    if (is_device_name(name)) return "FAT has no files with the name of a device of DOS";
    if (units->size() > most_units) return "the name is longer than the 255 characters that FAT has";
    return {};
}

std::optional<std::u16string> folded(const std::string& name) {
    auto units = utf16(name);
    if (units) {
        for (auto& unit : *units) unit = capital(unit);
    }
    return units;
}

std::string ShortNames::made(const std::string& name) {
    // Readers without long names find a file whose name differs only in case.
    if (auto exact = exact_short_name(upper(name)); exact && take(*exact)) return *std::move(exact);
    const auto [base, ending] = short_parts(name);
    unsigned most = 9;
    for (std::size_t digits = 1;; ++digits, most = most * 10 + 9) {
        const auto front = base.substr(0, 7 - digits);
        auto& number = next_[{front, ending, digits}];
        for (number = std::max(number, most / 10 + 1); number <= most; ++number) {
            auto made = fmt::format("{:<8}{:<3}", fmt::format("{}~{}", front, number), ending);
            if (take(made)) return made;
        }
    }
}

// ---- Entries ----

std::size_t entries_of(const std::string& name) {
    if (exact_short_name(name)) return 1;
    return 1 + divide_up(utf16(name)->size(), units_in_entry);
}

void add_entry(std::vector<std::byte>& to, const std::string& short_name, std::uint8_t attributes,
               std::uint32_t cluster, std::uint32_t size, std::int64_t mtime) {
    const auto at = to.size();
    to.resize(at + entry_bytes);
    const std::span bytes(to);
    std::ranges::copy(as_bytes(short_name), bytes.subspan(at).begin());
    bytes[at + 11] = static_cast<std::byte>(attributes);
    const auto [date, time] = moment_of(mtime);
    store_le(bytes, at + 14, time);  // made
    store_le(bytes, at + 16, date);
    store_le(bytes, at + 18, date);  // read
    store_le(bytes, at + 20, static_cast<std::uint16_t>(cluster >> 16));
    store_le(bytes, at + 22, time);  // written
    store_le(bytes, at + 24, date);
    store_le(bytes, at + 26, static_cast<std::uint16_t>(cluster));
    store_le(bytes, at + 28, size);
}

std::uint8_t sum_of(std::span<const std::byte> short_name) {
    std::uint8_t sum = 0;
    for (const auto byte : short_name)
        sum = static_cast<std::uint8_t>((sum >> 1 | sum << 7) + static_cast<std::uint8_t>(byte));
    return sum;
}

void add_long_name(std::vector<std::byte>& to, const std::string& name, const std::string& short_name) {
    const auto sum = sum_of(as_bytes(short_name));
    const auto units = *utf16(name);
    const auto count = divide_up(units.size(), units_in_entry);
    for (auto i = count; i-- > 0;) {
        const auto at = to.size();
        to.resize(at + entry_bytes);
        const std::span bytes(to);
        bytes[at] = static_cast<std::byte>((i + 1) | (i + 1 == count ? 0x40 : 0));
        bytes[at + 11] = std::byte{is_long_name};
        bytes[at + 13] = std::byte{sum};
        for (std::size_t k = 0; k < units_in_entry; ++k) {
            const auto index = i * units_in_entry + k;
            const auto unit = index < units.size()    ? std::uint16_t{units[index]}
                              : index == units.size() ? std::uint16_t{0}
                                                      : std::uint16_t{0xffff};
            store_le(bytes, at + (k < 5 ? 1 + 2 * k : k < 11 ? 14 + 2 * (k - 5) : 28 + 2 * (k - 11)), unit);
        }
    }
}

std::string LongName::take(std::span<const std::byte> entry) {
    if ((static_cast<unsigned>(entry[11]) & 0x3f) != is_long_name) {
        const bool whole = left_ == 0 && !text_.empty() && entry[0] != removed_mark && sum_of(entry.first(11)) == sum_;
        auto name = whole ? utf16_text(text_, false) : std::string();
        forget();
        return name;
    }
    const auto first = static_cast<unsigned>(entry[0]);
    const unsigned number = first & 0x3f;
    if ((first & 0x40) != 0) {
        left_ = number;
        sum_ = static_cast<unsigned>(entry[13]);
        text_.assign(std::size_t{26} * number, std::byte{0});
    }
    if (number == 0 || number != left_ || static_cast<unsigned>(entry[13]) != sum_) {
        forget();
        return {};
    }
    auto to = text_.begin() + std::ptrdiff_t{26} * --left_;
    for (const auto& part : {entry.subspan(1, 10), entry.subspan(14, 12), entry.subspan(28, 4)})
        to = std::ranges::copy(part, to).out;
    return {};
}

void LongName::forget() {
    text_.clear();
    left_ = 0;
}

// ---- Times ----

Moment moment_of(std::int64_t at) {
    using namespace std::chrono;
    const sys_seconds when(seconds(std::clamp(at, first_time, last_time)));
    const auto day = floor<days>(when);
    const year_month_day date(day);
    const hh_mm_ss time(when - day);
    return {static_cast<std::uint16_t>((static_cast<int>(date.year()) - 1980) << 9 |
                                       static_cast<int>(static_cast<unsigned>(date.month())) << 5 |
                                       static_cast<int>(static_cast<unsigned>(date.day()))),
            static_cast<std::uint16_t>(time.hours().count() << 11 | time.minutes().count() << 5 |
                                       time.seconds().count() / 2)};
}

std::optional<std::int64_t> seconds_of(Moment moment) {
    using namespace std::chrono;
    const year_month_day date(year(1980 + (moment.date >> 9)), month(moment.date >> 5 & 0xf), day(moment.date & 0x1f));
    if (!date.ok()) return {};
    const auto time = hours(moment.time >> 11) + minutes(moment.time >> 5 & 0x3f) + seconds(2 * (moment.time & 0x1f));
    return (sys_seconds(sys_days(date)) + time).time_since_epoch().count();
}

}  // namespace qcow::fat
