#include "create_options.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <initializer_list>

namespace tool {
namespace {

using qcow::CreateOptions;

std::unexpected<qcow::Error> bad_value(std::string_view name, std::string_view value, std::string_view possible) {
    return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, fmt::format("option {}", name),
                                       fmt::format("\"{}\" is not {}", value, possible)});
}

qcow::Result<void> set_switch(bool& target, std::string_view name, std::string_view value) {
    if (value != "on" && value != "off") return bad_value(name, value, "on or off");
    target = value == "on";
    return {};
}

qcow::Result<void> set_size(std::uint64_t& target, std::string_view name, std::string value) {
    if (!size_text(value).empty()) return bad_value(name, value, "a size, such as 64k or 2M");
    target = parse_size(value);
    return {};
}

template <class T>
using Words = std::initializer_list<std::pair<std::string_view, T>>;

template <class T>
qcow::Result<void> set_word(T& target, std::string_view name, std::string_view value, Words<T> words,
                            std::string_view possible) {
    for (const auto& [word, meaning] : words) {
        if (word == value) {
            target = meaning;
            return {};
        }
    }
    return bad_value(name, value, possible);
}

qcow::Result<void> set_option(CreateOptions& o, std::string_view name, const std::string& value) {
    if (name == "compat")
        return set_word(o.version, name, value, {{"0.10", 2}, {"v2", 2}, {"1.1", 3}, {"v3", 3}}, "0.10 or 1.1");
    if (name == "cluster_size") return set_size(o.cluster_size, name, value);
    if (name == "refcount_bits") {
        std::uint64_t bits = 0;
        if (auto set = set_size(bits, name, value); !set) return set;
        o.refcount_bits = static_cast<unsigned>(std::min<std::uint64_t>(bits, 1000));
        return {};
    }
    if (name == "lazy_refcounts") return set_switch(o.lazy_refcounts, name, value);
    if (name == "extended_l2") return set_switch(o.extended_l2, name, value);
    if (name == "compression_type") {
        return set_word(o.compression, name, value,
                        {{"zlib", qcow::Compression::zlib}, {"zstd", qcow::Compression::zstd}}, "zlib or zstd");
    }
    if (name == "preallocation") {
        using enum qcow::Preallocation;
        return set_word(o.preallocation, name, value,
                        {{"off", off}, {"metadata", metadata}, {"falloc", falloc}, {"full", full}},
                        "off, metadata, falloc or full");
    }
    if (name == "data_file_raw") return set_switch(o.data_file_raw, name, value);
    if (name == "data_file") {
        o.data_file_name = value;
    } else if (name == "backing_file") {
        o.backing_name = value;
    } else if (name == "backing_fmt") {
        o.backing_format = value;
    } else if (name == "size") {
        return set_size(o.size, name, value);
    } else {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, fmt::format("option {}", name),
                                           "there is none of that name; see qcow create --help"});
    }
    return {};
}

}  // namespace

const char* const new_image_help =
    "Options for -o, as name=value, separated by commas:\n"
    "  compat=1.1              version 3; 0.10 is version 2\n"
    "  cluster_size=64k        512 to 2M\n"
    "  refcount_bits=16        1 to 64\n"
    "  lazy_refcounts=off      postpone refcounts\n"
    "  extended_l2=off         subclusters of 1/32; needs clusters of at least 16k\n"
    "  compression_type=zlib   or zstd\n"
    "  preallocation=off       metadata, falloc (reserves space) or full (writes zeros)\n"
    "  data_file=NAME          keep the data in a file of their own\n"
    "  data_file_raw=off       that file is a raw image by itself\n"
    "  backing_file, backing_fmt, size   as -b, -F and SIZE";

void add_new_image_options(CLI::App& app, NewImageArguments& arguments) {
    app.add_option("-o,--options", arguments.options, "Options of the new image, name=value,... (see below)")
        ->allow_extra_args(false);
}

qcow::Result<CreateOptions> parse_create_options(const NewImageArguments& arguments) {
    CreateOptions options;
    for (std::string_view rest : arguments.options) {
        while (!rest.empty()) {
            const auto comma = std::min(rest.find(','), rest.size());
            const auto pair = rest.substr(0, comma);
            rest.remove_prefix(std::min(comma + 1, rest.size()));
            const auto equals = pair.find('=');
            // As with QEMU, a name alone turns it on.
            const auto name = pair.substr(0, equals);
            const std::string value(equals == std::string_view::npos ? "on" : pair.substr(equals + 1));
            if (auto set = set_option(options, name, value); !set) return std::unexpected(std::move(set).error());
        }
    }
    if (!arguments.backing.empty()) options.backing_name = arguments.backing;
    if (!arguments.backing_format.empty()) options.backing_format = arguments.backing_format;
    return options;
}

std::string beside(const std::string& image_path, const std::string& name) {
    return (std::filesystem::path(image_path).parent_path() / name).string();
}

qcow::Result<std::optional<qcow::NewFile>> begin_data_file(const std::string& image_path,
                                                           const CreateOptions& options) {
    if (options.data_file_name.empty()) return std::nullopt;
    auto file = qcow::NewFile::begin(beside(image_path, options.data_file_name));
    if (!file) return std::unexpected(std::move(file).error());
    return *std::move(file);
}

}  // namespace tool
