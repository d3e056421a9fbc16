#include "format/file_name.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/within_memory.h"

namespace qcow::format {
namespace {

using Json = nlohmann::json;

constexpr std::size_t max_bytes = 4096;  // no path is longer

/// How a scheme is written: what stands before the colon, and the drivers of a description that stand for it.
struct Syntax {
    Scheme scheme;
    std::string_view name;
    std::array<std::string_view, 2> drivers;
};
constexpr std::array schemes = {
    Syntax{Scheme::file, "file", {"file", "host_device"}},
};

const Syntax* find_scheme(std::string_view name) {
    const auto* const found = std::ranges::find(schemes, name, &Syntax::name);
    return found == schemes.end() ? nullptr : found;
}

const Syntax* find_driver(std::string_view driver) {
    const auto* const found = std::ranges::find_if(schemes, [&](const Syntax& syntax) {
        return std::ranges::find(syntax.drivers, driver) != syntax.drivers.end();
    });
    return found == schemes.end() ? nullptr : found;
}

/// Options that do not change which bytes the disk has.
constexpr std::array harmless_options = {
    "node-name", "read-only",  "auto-read-only", "discard",    "detect-zeroes", "locking",
    "aio",       "drop-cache", "cache",          "pr-manager", "aio-max-batch", "x-check-cache-dropped"};

bool is_harmless(std::string_view key) {
    return std::ranges::any_of(harmless_options, [&](std::string_view option) {
        return key == option || (key.starts_with(option) && key.substr(option.size()).starts_with("."));
    });
}

std::unexpected<Error> bad_description(std::string what, Errc code = Errc::corrupt) {
    return fail(code, "json: description", std::move(what));
}

/// A value of a description.
struct Value {
    enum class Kind : std::uint8_t { text, null, other, object, array };
    Kind kind = Kind::other;
    std::string text;  // of anything but objects and arrays
};

/// A description, by key. The keys of nested objects are joined by dots: QEMU writes them in either way.
using Node = std::map<std::string, Value>;

/// Reads a description into a Node. There are no Json objects on the way: to destroy one takes memory.
class NodeReader final : public Json::json_sax_t {
public:
    explicit NodeReader(Node& node) : node_(node) {}

    bool null() override { return put(Value::Kind::null, "null"); }
    bool boolean(bool value) override { return put(Value::Kind::other, value ? "true" : "false"); }
    bool number_integer(std::int64_t value) override { return put(Value::Kind::other, fmt::format("{}", value)); }
    bool number_unsigned(std::uint64_t value) override { return put(Value::Kind::other, fmt::format("{}", value)); }
    bool number_float(double, const std::string& text) override { return put(Value::Kind::other, text); }
    bool string(std::string& value) override { return put(Value::Kind::text, std::move(value)); }
    bool binary(Json::binary_t&) override { return false; }

    bool start_object(std::size_t) override {
        if (arrays_ == 0) objects_.push_back({path_.size(), true});
        return true;
    }

    bool key(std::string& key) override {
        if (arrays_ != 0) return true;
        auto& object = objects_.back();
        object.empty = false;
        path_.resize(object.path_length);
        if (objects_.size() > 1) path_ += '.';
        path_ += key;
        return true;
    }

    bool end_object() override {
        if (arrays_ != 0) return true;
        const auto object = objects_.back();
        objects_.pop_back();
        path_.resize(object.path_length);
        return !object.empty || objects_.empty() || put(Value::Kind::object, "");
    }

    bool start_array(std::size_t) override {
        const bool outermost = arrays_ == 0;
        return (!outermost || put(Value::Kind::array, "")) && ++arrays_ != 0;
    }

    bool end_array() override {
        --arrays_;
        return true;
    }

    bool parse_error(std::size_t, const std::string&, const Json::exception&) override { return false; }

private:
    struct Object {
        std::size_t path_length = 0;
        bool empty = true;
    };

    /// False where it belongs to no object.
    bool put(Value::Kind kind, std::string text) {
        if (arrays_ != 0) return true;
        if (objects_.empty()) return false;
        node_[path_] = {kind, std::move(text)};
        return true;
    }

    Node& node_;
    std::string path_;
    std::vector<Object> objects_;  // those that are open
    unsigned arrays_ = 0;          // what is in them means nothing
};

Result<std::string> text_of(const Node& node, const std::string& key) {
    const auto& value = node.at(key);
    if (value.kind != Value::Kind::text) return bad_description(fmt::format("\"{}\" is not a string", key));
    return value.text;
}

std::unexpected<Error> bad_option(std::string_view key) {
    return bad_description(fmt::format("option \"{}\" is not supported", key), Errc::unsupported);
}

/// {"driver": "file", "filename": ...}: where the bytes lie.
Result<Location> parse_protocol_level(const Node& node) {
    Location location;
    bool has_path = false;
    for (const auto& [key, value] : node) {
        if (key == "filename" && value.kind == Value::Kind::text) {
            location.path = value.text;
            has_path = true;
        } else if (key == "driver" && value.kind == Value::Kind::text) {
            const auto* const syntax = find_driver(value.text);
            if (syntax == nullptr) {
                return bad_description(fmt::format("driver \"{}\" is not supported; only local files are", value.text),
                                       Errc::unsupported);
            }
            location.scheme = syntax->scheme;
        } else if (is_harmless(key)) {
            location.options[key] = value.text;
        } else {
            return bad_option(key);
        }
    }
    if (!has_path) return bad_description("no \"filename\"");
    return location;
}

/// What the description says of the file that holds the image, if anything.
Result<std::optional<Node>> file_of(const Node& node) {
    constexpr std::string_view prefix = "file.";
    std::optional<Node> file;
    for (const auto& [key, value] : node) {
        if (key == "file" && value.kind == Value::Kind::text) {
            return bad_description("refers to a node by name, which means nothing outside of the process that wrote it",
                                   Errc::unsupported);
        }
        if (key == "file" && value.kind != Value::Kind::object) return bad_description("\"file\" is not an object");
        if (key != "file" && !key.starts_with(prefix)) continue;
        if (!file) file.emplace();
        if (key != "file") file->emplace(key.substr(prefix.size()), value);
    }
    return file;
}

/// QEMU also takes strings in single quotes, and \' in those of either kind.
std::string with_double_quotes(std::string_view text) {
    std::string result;
    char quote = 0;  // that of the string we are in
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (quote == 0) {
            if (c == '"' || c == '\'') quote = c;
            result += quote == 0 ? c : '"';
        } else if (c == quote) {
            quote = 0;
            result += '"';
        } else if (c == '"') {
            result += "\\\"";
        } else if (c == '\\' && i + 1 < text.size()) {
            ++i;
            if (text[i] != '\'') result += c;
            result += text[i];
        } else {
            result += c;
        }
    }
    return result;
}

Result<Location> parse_description(std::string_view text) {
    Node node;
    NodeReader reader(node);
    if (!Json::sax_parse(with_double_quotes(text), &reader)) return bad_description("not a JSON object");
    const bool has_driver = node.contains("driver");
    const auto driver = has_driver ? TRY(text_of(node, "driver")) : std::string();
    const auto file = TRY(file_of(node));
    const bool is_protocol_level = !file && (has_driver || node.contains("filename"));
    if (is_protocol_level) return parse_protocol_level(node);

    Location result;
    if (file) result = TRY(parse_protocol_level(*file));
    if (has_driver) {
        result.format = format_from_name(driver);
        if (!result.format)
            return bad_description(fmt::format("driver \"{}\" is not supported", driver), Errc::unsupported);
    }
    // How it is encrypted, the image says itself.
    const std::string_view encrypt = result.format == Format::luks ? "" : "encrypt.";
    for (const auto& [key, value] : node) {
        if (key == "driver" || key == "file" || key.starts_with("file.") || key == "encrypt.format") continue;
        if (key.starts_with(encrypt) && key.substr(encrypt.size()) == "key-secret") {
            result.secret = TRY(text_of(node, key));
        } else if (key == "backing" && value.kind == Value::Kind::null) {
            result.alone = true;
        } else if (!is_harmless(key)) {
            return bad_option(key);
        }
    }
    if (result.path.empty()) return bad_description("no \"file\"");
    return result;
}

/// The scheme of "scheme:rest", empty for a path.
std::string_view scheme_of(std::string_view name) {
    const auto colon = name.find(':');
    if (colon == std::string_view::npos || colon == 0 || name.substr(0, colon).find('/') != std::string_view::npos)
        return {};
    return name.substr(0, colon);
}

/// No scheme has one letter.
bool has_drive(std::string_view name) { return scheme_of(name).size() == 1; }

Result<Location> parse_local_name(std::string_view name) {
    const auto scheme = scheme_of(name);
    if (is_description(name)) return parse_description(name.substr(5));
    if (const auto* const known = find_scheme(scheme))
        return Location{.scheme = known->scheme, .path = std::string(name.substr(scheme.size() + 1))};
    if (scheme.empty()) return Location{.path = std::string(name)};
    if (has_drive(name)) {
        return fail(Errc::unsupported, "",
                    fmt::format("\"{}\" is a path of Windows, which means nothing on this system", name));
    }
    return fail(Errc::unsupported, "",
                fmt::format("\"{}\" names something by the scheme \"{}:\", which is not supported; a file of that name "
                            "is written \"./{}\"",
                            name, scheme, name));
}

/// What holds for a name of any kind.
Result<Location> verified(std::string_view name, Result<Location> (*parse)(std::string_view)) {
    // Also bounds how deeply a description can be nested.
    if (name.size() > max_bytes) {
        return fail(Errc::unsupported, "",
                    fmt::format("a file name of {} bytes; at most {} are supported", name.size(), max_bytes));
    }
    auto result = TRY(parse(name));
    if (result.path.empty()) return fail(Errc::corrupt, "", "the name is empty");
    if (result.path.find('\0') != std::string::npos) return fail(Errc::corrupt, "", "a file name with a zero byte");
    return result;
}

/// Whether a person who gives this name means a path, colon and all.
bool is_path(std::string_view name) {
    const auto scheme = scheme_of(name);
    return find_scheme(scheme) == nullptr && !is_description(name) && !name.substr(scheme.size()).starts_with("://");
}

Result<Location> parse_given(std::string_view name) {
    return is_path(name) ? Location{.path = std::string(name)} : parse_local_name(name);
}

}  // namespace

Result<Location> parse_file_name(std::string_view name, FileReference::Role role) {
    return verified(name, role == FileReference::Role::backing_file ? parse_local_name : parse_given);
}

bool is_description(std::string_view name) { return scheme_of(name) == "json"; }

bool is_windows_path(std::string_view name) {
    return has_drive(name) || (name.find('\\') != std::string_view::npos && name.find('/') == std::string_view::npos);
}

std::string resolve(std::string_view path, std::string_view from) {
    // Not normalised: "a/../b" is not "b" where a is a symbolic link.
    return (std::filesystem::path(from).parent_path() / std::filesystem::path(path)).string();
}

std::string shell_word(std::string_view word) {
    constexpr std::string_view plain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./:@%+=,-";
    if (!word.empty() && word.find_first_not_of(plain) == std::string_view::npos) return std::string(word);
    std::string quoted = "'";
    for (const char c : word) quoted += c == '\'' ? "'\\''" : std::string(1, c);
    return quoted + "'";
}

}  // namespace qcow::format

namespace qcow {

Result<Location> parse_location(std::string_view name, std::string_view image) {
    return within_memory([&]() -> Result<Location> {
        auto parsed = format::verified(name, format::parse_given);
        if (!parsed) {
            auto error = std::move(parsed).error();
            if (error.code == Errc::corrupt) error.code = Errc::invalid_argument;
            return std::unexpected(std::move(error));
        }
        if (!image.empty()) parsed->path = format::resolve(parsed->path, image);
        return parsed;
    });
}

Result<std::string> recorded_name(std::string_view name) {
    return within_memory([&]() -> Result<std::string> {
        // QEMU takes a relative path behind "file:" from its working directory, but a plain one from the image's.
        constexpr std::string_view file = "file:";
        if (name.starts_with(file) && !name.substr(file.size()).starts_with('/')) name.remove_prefix(file.size());
        const bool colon_in_path = !format::scheme_of(name).empty() && format::is_path(name);
        return (colon_in_path ? "./" : "") + std::string(name);
    });
}

}  // namespace qcow
