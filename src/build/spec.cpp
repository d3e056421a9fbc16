// Specifications in TOML.

#define TOML_EXCEPTIONS 0
#define TOML_HEADER_ONLY 1
#include <fmt/format.h>
#include <toml++/toml.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <ranges>
#include <utility>

#include "base/bits.h"
#include "base/try.h"
#include "base/within_memory.h"
#include "qcow/build.h"
#include "qcow/text.h"

namespace qcow {
namespace {

constexpr std::uint64_t largest_size = std::numeric_limits<std::int64_t>::max();

/// Where an error is: the file and what is in it.
struct Context {
    std::string name;       // of the file
    std::string directory;  // of relative names

    [[nodiscard]] std::unexpected<Error> refuse(const toml::source_region& at, std::string what) const {
        return fail(Errc::invalid_argument, place(at), std::move(what));
    }
    [[nodiscard]] std::string place(const toml::source_region& at) const {
        return fmt::format("{}:{}:{}", name, at.begin.line, at.begin.column);
    }
    [[nodiscard]] std::string resolve(const std::string& path) const {
        return (std::filesystem::path(directory) / path).lexically_normal().string();
    }
};

/// "16MiB", "1.5 GB", "512", "1G": KB, MB, ... are powers of 1000, the others of 1024.
std::optional<std::uint64_t> parse_size(std::string_view text) {
    const std::string digits(text.substr(0, text.find_first_not_of("0123456789")));
    std::uint64_t value = 0;
    if (std::from_chars(digits.data(), digits.data() + digits.size(), value).ec != std::errc()) return {};
    text.remove_prefix(digits.size());
    long double fraction = 0;
    if (text.starts_with('.')) {
        text.remove_prefix(1);
        for (long double weight = 0.1L; !text.empty() && text.front() >= '0' && text.front() <= '9'; weight /= 10) {
            fraction += static_cast<long double>(text.front() - '0') * weight;
            text.remove_prefix(1);
        }
    }
    auto unit = std::string(text);
    unit.erase(0, std::min(unit.find_first_not_of(' '), unit.size()));
    for (auto& c : unit) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    std::uint64_t factor = 1;
    if (!unit.empty() && unit != "b") {
        const auto power = std::string_view("kmgtpe").find(unit.front());
        if (power == std::string_view::npos) return {};
        const auto rest = unit.substr(1);
        if (!rest.empty() && rest != "b" && rest != "ib") return {};
        for (std::size_t i = 0; i <= power; ++i) factor *= rest == "b" ? 1000 : 1024;
    }
    if (value >= largest_size / factor) return {};
    return value * factor + static_cast<std::uint64_t>(std::llround(fraction * static_cast<long double>(factor)));
}

/// A table of the specification. The keys that were asked for are those that there are: `finish` refuses others.
class Section {
public:
    Section(const Context& context, const toml::table& table, std::string name)
        : context_(context), table_(table), name_(std::move(name)) {
        note("", table);
    }

    const toml::node* find(std::string_view key) {
        known_.emplace_back(key);
        const auto* node = table_.get(key);
        if (node != nullptr) note(std::string(key), *node);
        return node;
    }
    void note(std::string key, const toml::node& node) { places_[std::move(key)] = context_.place(node.source()); }

    Result<void> read(std::string_view key, std::string& to) {
        const auto* node = find(key);
        if (node == nullptr) return {};
        const auto text = node->value_exact<std::string>();
        if (!text) return refuse(*node, key, "wants a text in quotes");
        if (text->find('\0') != std::string::npos) return refuse(*node, key, "has a zero byte");
        to = *text;
        return {};
    }

    Result<void> read(std::string_view key, bool& to) {
        const auto* node = find(key);
        if (node == nullptr) return {};
        const auto value = node->value_exact<bool>();
        if (!value) return refuse(*node, key, "wants true or false");
        to = *value;
        return {};
    }

    /// A whole number from `least` to `most`.
    template <class T>
    Result<void> read_number(std::string_view key, std::optional<T>& to, std::int64_t least, std::int64_t most) {
        const auto* node = find(key);
        if (node == nullptr) return {};
        const auto value = node->value_exact<std::int64_t>();
        if (!value || *value < least || *value > most)
            return refuse(*node, key, fmt::format("wants a whole number from {} to {}", least, most));
        to = static_cast<T>(*value);
        return {};
    }

    Result<void> read_size(std::string_view key, std::optional<std::uint64_t>& to) {
        const auto* node = find(key);
        if (node == nullptr) return {};
        const auto number = node->value_exact<std::int64_t>();
        const auto text = node->value_exact<std::string>();
        if (number && *number >= 0) to = static_cast<std::uint64_t>(*number);
        if (text) to = parse_size(*text);
        if (to && *to <= largest_size) return {};
        return refuse(*node, key, "wants a size, such as \"16MiB\" or a number of bytes");
    }

    Result<void> read(std::string_view key, std::optional<Uuid>& to) {
        const auto* node = find(key);
        if (node == nullptr) return {};
        const auto text = node->value_exact<std::string>();
        if (text) to = parse_uuid(*text);
        if (!to) return refuse(*node, key, "wants a UUID, such as \"0fc63daf-8483-4772-8e79-3d69d8477de4\"");
        return {};
    }

    /// One text or a list of texts.
    Result<void> read(std::string_view key, std::vector<std::string>& to) {
        const auto* node = find(key);
        if (node == nullptr) return {};
        const auto* list = node->as_array();
        if (list == nullptr) {
            std::string one;
            TRY_VOID(read(key, one));
            to.push_back(std::move(one));
            return {};
        }
        for (const auto& element : *list) {
            const auto text = element.value_exact<std::string>();
            if (!text) return refuse(element, key, "wants texts in quotes");
            to.push_back(*text);
            note(fmt::format("{} {}", key, to.size()), element);
        }
        return {};
    }

    /// One of these words.
    template <class T>
    Result<void> read_word(std::string_view key, T& to, std::initializer_list<std::pair<std::string_view, T>> words) {
        const auto* node = find(key);
        if (node == nullptr) return {};
        std::vector<std::string> known;
        const auto text = node->value_exact<std::string>();
        for (const auto& [word, meaning] : words) {
            if (text && *text == word) {
                to = meaning;
                return {};
            }
            known.emplace_back(word);
        }
        return refuse(*node, key,
                      fmt::format("is {}, and must be {}{}", text ? "\"" + printable(*text, 64) + "\"" : "no text",
                                  fmt::join(known, ", "), text ? did_you_mean(*text, known) : ""));
    }

    [[nodiscard]] std::unexpected<Error> refuse(const toml::node& at, std::string_view key,
                                                const std::string& what) const {
        return context_.refuse(at.source(), fmt::format("{} in {} {}", key, name_, what));
    }
    [[nodiscard]] std::unexpected<Error> refuse(const std::string& what) const {
        return context_.refuse(table_.source(), fmt::format("{} {}", name_, what));
    }

    /// Refuses keys that nobody has asked for.
    [[nodiscard]] Result<void> finish() const {
        for (const auto& [key, node] : table_) {
            if (std::ranges::find(known_, key.str()) != known_.end()) continue;
            return context_.refuse(key.source(), fmt::format("{} has no key \"{}\"{}", name_, printable(key.str(), 64),
                                                             did_you_mean(key.str(), known_)));
        }
        return {};
    }

    [[nodiscard]] const Context& context() const { return context_; }
    [[nodiscard]] const std::string& name() const { return name_; }
    /// Of the keys that were asked for.
    [[nodiscard]] const KeyPlaces& places() const { return places_; }
    [[nodiscard]] bool has(std::string_view key) const { return table_.contains(key); }

private:
    const Context& context_;
    const toml::table& table_;
    std::string name_;
    std::vector<std::string> known_;
    KeyPlaces places_;
};

/// Permissions: the text "0644" is octal, as everywhere.
Result<void> read_mode(Section& section, std::optional<unsigned>& to) {
    const auto* node = section.find("mode");
    if (node == nullptr) return {};
    if (const auto text = node->value_exact<std::string>()) {
        unsigned value = 0;
        const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value, 8);
        if (error == std::errc() && end == text->data() + text->size() && value <= 07777) {
            to = value;
            return {};
        }
    }
    const auto number = node->value_exact<std::int64_t>();
    if (number && *number != 0 && node->as_integer()->flags() != toml::value_flags::format_as_octal)
        return section.refuse(*node, "mode", "is not written as an octal number, such as \"0644\" or 0o644");
    if (number && *number >= 0 && *number <= 07777) {
        to = static_cast<unsigned>(*number);
        return {};
    }
    return section.refuse(*node, "mode", "wants permissions, such as \"0644\" or 0o644");
}

Result<FileSpec> parse_file(Section section) {
    using enum FileSpec::Kind;
    FileSpec file;
    // A wrong key may be the reason that one is missing.
    for (const auto* key :
         {"path", "type", "content", "source", "target", "major", "minor", "mode", "uid", "gid", "mtime"})
        section.find(key);
    TRY_VOID(section.finish());
    TRY_VOID(section.read("path", file.path));
    if (file.path.empty()) return section.refuse("wants a path");
    std::optional<FileSpec::Kind> kind;
    {
        auto named = change;
        TRY_VOID(section.read_word("type", named,
                                   {{"file", regular},
                                    {"directory", directory},
                                    {"symlink", symlink},
                                    {"hardlink", hardlink},
                                    {"character-device", character_device},
                                    {"block-device", block_device},
                                    {"fifo", fifo},
                                    {"socket", socket},
                                    {"remove", remove}}));
        if (section.has("type")) kind = named;
    }
    TRY_VOID(section.read("content", file.content));
    TRY_VOID(section.read("source", file.source));
    TRY_VOID(section.read("target", file.target));
    if (!file.source.empty()) file.source = section.context().resolve(file.source);
    const bool contents = section.has("content") || section.has("source");
    if (section.has("content") && section.has("source"))
        return section.refuse("has content and source; leave one of them out");
    if (!kind && contents) kind = regular;
    if (!kind && section.has("target")) kind = symlink;
    file.kind = kind.value_or(change);
    if (contents && file.kind != regular) return section.refuse("has contents and is no file");
    const bool link = file.kind == symlink || file.kind == hardlink;
    if (link != section.has("target") || (link && file.target.empty()))
        return section.refuse(link ? "is a link and wants a target" : "has a target and is no link");
    std::optional<unsigned> major;
    std::optional<unsigned> minor;
    TRY_VOID(section.read_number("major", major, 0, 4095));
    TRY_VOID(section.read_number("minor", minor, 0, 1048575));
    const bool device = file.kind == character_device || file.kind == block_device;
    if (device != (major && minor) || (!device && (major || minor)))
        return section.refuse(device ? "is a device and wants major and minor" : "is no device and has a number");
    file.major = major.value_or(0);
    file.minor = minor.value_or(0);
    TRY_VOID(read_mode(section, file.mode));
    TRY_VOID(section.read_number("uid", file.uid, 0, 0xfffffffe));
    TRY_VOID(section.read_number("gid", file.gid, 0, 0xfffffffe));
    TRY_VOID(section.read_number("mtime", file.mtime, -0x80000000LL, 0x37fffffffLL));
    file.places = section.places();
    return file;
}

/// The devices that a small system needs in /dev, and those of a larger one.
Result<std::vector<FileSpec>> device_files(Section& section) {
    enum class Devices : std::uint8_t { none, minimal, standard };
    auto devices = Devices::none;
    TRY_VOID(
        section.read_word("rootdevs", devices,
                          {{"none", Devices::none}, {"minimal", Devices::minimal}, {"standard", Devices::standard}}));
    std::vector<FileSpec> files;
    if (devices == Devices::none) return files;
    const auto add = [&](std::string name, unsigned major, unsigned minor, unsigned mode, bool block = false) {
        FileSpec file{.path = "/dev/" + std::move(name)};
        file.kind = block ? FileSpec::Kind::block_device : FileSpec::Kind::character_device;
        file.major = major;
        file.minor = minor;
        file.mode = mode;
        files.push_back(std::move(file));
    };
    add("console", 5, 1, 0600);
    add("null", 1, 3, 0666);
    add("zero", 1, 5, 0666);
    add("ptmx", 5, 2, 0666);
    add("tty", 5, 0, 0666);
    add("fuse", 10, 229, 0666);
    add("random", 1, 8, 0666);
    add("urandom", 1, 9, 0666);
    if (devices == Devices::minimal) return files;
    for (unsigned i = 0; i < 16; ++i) add(fmt::format("tty{}", i), 4, i, 0620);
    for (unsigned i = 0; i < 4; ++i) add(fmt::format("ttyS{}", i), 4, 64 + i, 0660);
    add("kmsg", 1, 11, 0600);
    add("mem", 1, 1, 0640);
    add("port", 1, 4, 0640);
    for (unsigned disk = 0; disk < 4; ++disk) {
        const auto letter = static_cast<char>('a' + disk);
        for (unsigned part = 0; part < 16; ++part)
            add(fmt::format("sd{}{}", letter, part == 0 ? "" : std::to_string(part)), 8, disk * 16 + part, 0660, true);
        for (unsigned part = 0; part < 16; ++part) {
            add(fmt::format("hd{}{}", letter, part == 0 ? "" : std::to_string(part)), disk < 2 ? 3 : 22,
                disk % 2 * 64 + part, 0660, true);
        }
    }
    return files;
}

Result<void> read_free(Section& section, FilesystemSpec& filesystem) {
    const auto* node = section.find("free");
    if (node == nullptr) return {};
    if (const auto text = node->value_exact<std::string>(); text && text->ends_with('%')) {
        unsigned percent = 0;
        const auto* end = text->data() + text->size() - 1;
        const auto [last, error] = std::from_chars(text->data(), end, percent);
        if (error != std::errc() || last != end || percent > 10000)
            return section.refuse(*node, "free", "wants a size or a percentage, such as \"10%\"");
        filesystem.free_percent = percent;
        return {};
    }
    std::optional<std::uint64_t> bytes;
    TRY_VOID(section.read_size("free", bytes));
    filesystem.free_bytes = bytes.value_or(0);
    return {};
}

Result<void> read_options(Section& section, FilesystemSpec& filesystem) {
    const auto* node = section.find("options");
    if (node == nullptr) return {};
    const auto* table = node->as_table();
    if (table == nullptr) return section.refuse(*node, "options", "wants a table");
    for (const auto& [key, value] : *table) {
        auto& to = filesystem.options[std::string(key.str())];
        if (const auto text = value.value_exact<std::string>()) {
            to = *text;
        } else if (const auto number = value.value_exact<std::int64_t>()) {
            to = fmt::format("{}", *number);
        } else if (const auto word = value.value_exact<bool>()) {
            to = *word ? "on" : "off";
        } else {
            return section.refuse(value, key.str(), "wants a text, a whole number, true or false");
        }
        section.note(fmt::format("options.{}", key.str()), value);
    }
    return {};
}

Result<FilesystemSpec> parse_filesystem(Section section) {
    using enum FilesystemSpec::Type;
    FilesystemSpec filesystem;
    if (!section.has("type")) return section.refuse("wants a type, such as \"ext4\"");
    TRY_VOID(section.read_word("type", filesystem.type,
                               {{"ext2", ext2},
                                {"ext3", ext3},
                                {"ext4", ext4},
                                {"fat12", fat12},
                                {"fat16", fat16},
                                {"fat32", fat32},
                                {"vfat", vfat},
                                {"swap", swap},
                                {"raw", raw}}));
    TRY_VOID(section.read("source", filesystem.sources));
    for (auto& source : filesystem.sources) {
        if (source.empty()) return section.refuse(*section.find("source"), "source", "is empty");
        source = section.context().resolve(source);
    }
    if (section.has("label") && section.has("volume_label"))
        return section.refuse(*section.find("volume_label"), "volume_label", "is the same as label");
    TRY_VOID(section.read("label", filesystem.label));
    TRY_VOID(section.read("volume_label", filesystem.label));
    if (section.has("volume_label")) section.note("label", *section.find("volume_label"));
    TRY_VOID(section.read("uuid", filesystem.uuid));
    std::optional<std::uint32_t> volume_id;
    TRY_VOID(section.read_number("volume_id", volume_id, 0, 0xffffffff));
    if (volume_id) {
        if (filesystem.uuid) return section.refuse(*section.find("volume_id"), "volume_id", "is the same as uuid");
        filesystem.uuid.emplace();
        for (unsigned i = 0; i < 4; ++i) (*filesystem.uuid)[i] = static_cast<std::uint8_t>(*volume_id >> (24 - 8 * i));
    }
    TRY_VOID(section.read_size("size", filesystem.size));
    std::optional<std::uint64_t> block_size;
    TRY_VOID(section.read_size("block_size", block_size));
    if (block_size) {
        if (!std::has_single_bit(*block_size) || *block_size < 512 || *block_size > 65536)
            return section.refuse(*section.find("block_size"), "block_size", "wants a power of two from 512 to 65536");
        filesystem.block_size = static_cast<std::uint32_t>(*block_size);
    }
    TRY_VOID(section.read_number("mtime", filesystem.mtime, -0x80000000LL, 0x37fffffffLL));
    TRY_VOID(read_free(section, filesystem));
    std::string owner;
    TRY_VOID(section.read("owner", owner));
    if (!owner.empty() && owner != "root") return section.refuse(*section.find("owner"), "owner", "wants \"root\"");
    filesystem.root_owns_all = owner == "root";
    TRY_VOID(read_options(section, filesystem));
    std::optional<std::uint32_t> journal_blocks;
    TRY_VOID(section.read_number("journal_blocks", journal_blocks, 1024, 10240000));
    if (journal_blocks) {
        filesystem.options["journal_blocks"] = fmt::format("{}", *journal_blocks);
        section.note("options.journal_blocks", *section.find("journal_blocks"));
    }
    bool sparse = false;  // zeros never take space in the image
    TRY_VOID(section.read("sparse", sparse));
    filesystem.files = TRY(device_files(section));
    if (const auto* files = section.find("files")) {
        const auto* list = files->as_array();
        if (list == nullptr) return section.refuse(*files, "files", "wants a list of tables");
        for (const auto& element : *list) {
            const auto* table = element.as_table();
            if (table == nullptr) return section.refuse(element, "files", "wants tables, such as { path = \"/etc\" }");
            filesystem.files.push_back(
                TRY(parse_file(Section(section.context(), *table,
                                       fmt::format("file {} of {}", filesystem.files.size() + 1, section.name())))));
        }
    }
    TRY_VOID(section.finish());
    if (filesystem.type == raw && filesystem.sources.size() != 1)
        return section.refuse(*section.find("type"), "type", "is raw, which wants one source");
    if (filesystem.type == swap && !filesystem.sources.empty())
        return section.refuse(*section.find("source"), "source", "is given, and swap takes none");
    if ((filesystem.type == raw || filesystem.type == swap) && !filesystem.files.empty())
        return section.refuse("holds no files");
    filesystem.places = section.places();
    return filesystem;
}

Result<PartitionSpec> parse_partition(Section section, BuildSpec::Table table) {
    PartitionSpec partition;
    TRY_VOID(section.read("name", partition.name));
    std::string type = "linux";
    TRY_VOID(section.read("type", type));
    auto parsed = parse_partition_type(type);
    if (!parsed) return section.refuse(*section.find("type"), "type", parsed.error().what);
    partition.type = *parsed;
    if (table == BuildSpec::Table::gpt ? !partition.type.guid : !partition.type.mbr) {
        const auto what = fmt::format("is {}, which a {} partition table does not have", printable(type, 64),
                                      table == BuildSpec::Table::gpt ? "GPT" : "MBR");
        const auto* node = section.find("type");
        return node == nullptr ? section.refuse("type " + what) : section.refuse(*node, "type", what);
    }
    const auto* size = section.find("size");
    const auto text = size == nullptr ? std::nullopt : size->value_exact<std::string>();
    partition.remaining = text && (*text == "remaining" || *text == "Remaining");
    if (!partition.remaining) TRY_VOID(section.read_size("size", partition.size));
    if (partition.size && *partition.size == 0) return section.refuse(*size, "size", "is 0");
    TRY_VOID(section.read_size("offset", partition.offset));
    std::optional<std::uint64_t> align;
    TRY_VOID(section.read_size("align", align));
    if (align && !std::has_single_bit(*align))
        return section.refuse(*section.find("align"), "align", "wants a power of two");
    partition.align = align.value_or(partition.align);
    TRY_VOID(section.read("uuid", partition.uuid));
    TRY_VOID(section.read("bootable", partition.bootable));
    if (const auto* node = section.find("filesystem")) {
        const auto* filesystem = node->as_table();
        if (filesystem == nullptr) return section.refuse(*node, "filesystem", "wants a table");
        partition.filesystem =
            TRY(parse_filesystem(Section(section.context(), *filesystem, "the file system of " + section.name())));
    }
    TRY_VOID(section.finish());
    if (!partition.size && !partition.remaining && !partition.filesystem)
        return section.refuse("has neither a size nor a filesystem to be fitted to");
    partition.places = section.places();
    return partition;
}

Result<void> parse_image(Section section, BuildSpec& spec) {
    TRY_VOID(section.read_size("size", spec.size));
    TRY_VOID(section.read_word(
        "partition_table", spec.table,
        {{"gpt", BuildSpec::Table::gpt}, {"mbr", BuildSpec::Table::mbr}, {"none", BuildSpec::Table::none}}));
    std::optional<unsigned> sector;
    TRY_VOID(section.read_number("sector_size", sector, 512, 4096));
    if (sector && *sector != 512 && *sector != 4096)
        return section.refuse(*section.find("sector_size"), "sector_size", "wants 512 or 4096");
    spec.sector_size = sector.value_or(512);
    TRY_VOID(section.read("uuid", spec.uuid));
    TRY_VOID(section.read("seed", spec.seed));
    TRY_VOID(section.read("boot_code", spec.boot_code));
    if (!spec.boot_code.empty()) spec.boot_code = section.context().resolve(spec.boot_code);
    spec.places = section.places();
    return section.finish();
}

Result<BuildSpec> parse(std::string_view text, const Context& context) {
    if (text.size() > longest_build_spec)
        return fail(Errc::limit_exceeded, context.name, "the specification is longer than 16 MiB");
    const auto parsed = toml::parse(text, context.name);
    if (!parsed) {
        const auto& error = parsed.error();
        return context.refuse(error.source(), printable(error.description(), 400));
    }
    Section root(context, parsed.table(), "the specification");
    BuildSpec spec;
    const auto* image = root.find("image");
    const auto* filesystem = root.find("filesystem");
    const auto* partitions = root.find("partitions");
    TRY_VOID(root.finish());
    if (image != nullptr) {
        if (image->as_table() == nullptr) return root.refuse(*image, "image", "wants a table");
        if (partitions != nullptr) spec.table = BuildSpec::Table::gpt;  // unless it says otherwise
        TRY_VOID(parse_image(Section(context, *image->as_table(), "[image]"), spec));
    } else if (partitions != nullptr) {
        spec.table = BuildSpec::Table::gpt;
    }
    if (filesystem != nullptr) {
        if (filesystem->as_table() == nullptr) return root.refuse(*filesystem, "filesystem", "wants a table");
        spec.filesystem = TRY(parse_filesystem(Section(context, *filesystem->as_table(), "[filesystem]")));
    }
    if (partitions != nullptr) {
        const auto* list = partitions->as_array();
        if (list == nullptr || !list->is_array_of_tables())
            return root.refuse(*partitions, "partitions", "is written [[partitions]], once for each partition");
        for (const auto& element : *list) {
            const auto number = spec.partitions.size() + 1;
            spec.partitions.push_back(TRY(parse_partition(
                Section(context, *element.as_table(), fmt::format("partition {}", number)), spec.table)));
        }
    }
    if (spec.table == BuildSpec::Table::none) {
        if (!spec.partitions.empty())
            return root.refuse(*partitions, "partitions", "want partition_table = \"gpt\" or \"mbr\" in [image]");
        if (!spec.filesystem) return root.refuse("wants [filesystem], or [image] and [[partitions]]");
    } else {
        if (spec.filesystem) {
            return root.refuse(*filesystem, "filesystem",
                               "is for a disk without partitions; a partition has [partitions.filesystem]");
        }
        if (spec.partitions.empty()) return root.refuse("has a partition table and no [[partitions]]");
    }
    return spec;
}

}  // namespace

Result<BuildSpec> parse_build_spec(std::string_view text, const std::string& name, const std::string& directory) {
    return within_memory([&] { return parse(text, {printable(name), directory}); });
}

}  // namespace qcow
