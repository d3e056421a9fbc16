#include "format/file_name.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <nlohmann/json.hpp>

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

/// What is not UTF-8 in it is replaced.
std::string text_of(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

/// {"driver": "file", "filename": ...}: where the bytes lie.
Result<Location> parse_protocol_level(const Json& node) {
    if (node.is_string()) {
        return bad_description("refers to a node by name, which means nothing outside of the process that wrote it",
                               Errc::unsupported);
    }
    if (!node.is_object()) return bad_description("\"file\" is not an object");
    Location location;
    bool has_path = false;
    for (const auto& [key, value] : node.items()) {
        if (key == "filename" && value.is_string()) {
            location.path = value.get<std::string>();
            has_path = true;
        } else if (key == "driver" && value.is_string()) {
            const auto driver = value.get<std::string>();
            const auto* const syntax = find_driver(driver);
            if (syntax == nullptr) {
                return bad_description(fmt::format("driver \"{}\" is not supported; only local files are", driver),
                                       Errc::unsupported);
            }
            location.scheme = syntax->scheme;
        } else if (is_harmless(key)) {
            location.options[key] = value.is_string() ? value.get<std::string>() : text_of(value);
        } else {
            return bad_description(fmt::format("option \"{}\" is not supported", key), Errc::unsupported);
        }
    }
    if (!has_path) return bad_description("no \"filename\"");
    return location;
}

/// QEMU also writes nested keys flat: {"file.filename": ...}.
Json nested(const Json& flat) {
    Json result = Json::object();
    for (const auto& [key, value] : flat.items()) {
        if (key.starts_with("file.")) {
            if (!result.contains("file")) result["file"] = Json::object();
            if (result["file"].is_object()) result["file"][key.substr(5)] = value;
        } else {
            result[key] = value;
        }
    }
    return result;
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
    const Json parsed = Json::parse(with_double_quotes(text), nullptr, false);
    if (!parsed.is_object()) return bad_description("not a JSON object");
    const Json node = nested(parsed);

    const bool has_driver = node.contains("driver");
    if (has_driver && !node["driver"].is_string()) return bad_description("\"driver\" is not a string");
    const bool is_protocol_level = has_driver ? !node.contains("file") : node.contains("filename");
    if (is_protocol_level) return parse_protocol_level(node);

    Location result;
    if (node.contains("file")) result = TRY(parse_protocol_level(node["file"]));
    if (has_driver) {
        const auto driver = node["driver"].get<std::string>();
        result.format = format_from_name(driver);
        if (!result.format)
            return bad_description(fmt::format("driver \"{}\" is not supported", driver), Errc::unsupported);
    }
    for (const auto& [key, value] : node.items()) {
        if (key == "driver" || key == "file") continue;
        if (key == "backing" && value.is_null()) {
            result.alone = true;
        } else if (!is_harmless(key)) {
            return bad_description(fmt::format("option \"{}\" is not supported", key), Errc::unsupported);
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
        const bool colon_in_path = !format::scheme_of(name).empty() && format::is_path(name);
        return (colon_in_path ? "./" : "") + std::string(name);
    });
}

}  // namespace qcow
