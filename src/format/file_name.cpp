#include "format/file_name.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/try.h"

namespace qcow::format {
namespace {

using Json = nlohmann::json;

constexpr std::size_t max_bytes = 4096;  // no path is longer

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

/// {"driver": "file", "filename": ...}: where the bytes lie.
Result<std::string> parse_protocol_level(const Json& node) {
    if (node.is_string()) {
        return bad_description("refers to a node by name, which means nothing outside of the process that wrote it",
                               Errc::unsupported);
    }
    if (!node.is_object()) return bad_description("\"file\" is not an object");
    std::optional<std::string> path;
    for (const auto& [key, value] : node.items()) {
        if (key == "filename" && value.is_string()) {
            path = value.get<std::string>();
        } else if (key == "driver" && value.is_string()) {
            const auto driver = value.get<std::string>();
            if (driver != "file" && driver != "host_device") {
                return bad_description(fmt::format("driver \"{}\" is not supported; only local files are", driver),
                                       Errc::unsupported);
            }
        } else if (!is_harmless(key)) {
            return bad_description(fmt::format("option \"{}\" is not supported", key), Errc::unsupported);
        }
    }
    if (!path) return bad_description("no \"filename\"");
    return *std::move(path);
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

Result<FileName> parse_description(std::string_view text) {
    const Json parsed = Json::parse(text, nullptr, false);
    if (!parsed.is_object()) return bad_description("not a JSON object");
    const Json node = nested(parsed);

    FileName result;
    if (node.contains("driver")) {
        if (!node["driver"].is_string()) return bad_description("\"driver\" is not a string");
        const auto driver = node["driver"].get<std::string>();
        if (!node.contains("file")) {
            result.path = TRY(parse_protocol_level(node));
            return result;
        }
        result.format = format_from_name(driver);
        if (!result.format)
            return bad_description(fmt::format("driver \"{}\" is not supported", driver), Errc::unsupported);
    } else if (node.contains("filename")) {
        result.path = TRY(parse_protocol_level(node));
        return result;
    }
    for (const auto& [key, value] : node.items()) {
        if (key == "driver") continue;
        if (key == "file") {
            result.path = TRY(parse_protocol_level(value));
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

Result<FileName> parse_local_name(std::string_view name) {
    const auto scheme = scheme_of(name);
    if (is_description(name)) return parse_description(name.substr(5));
    if (scheme == "file") return FileName{std::string(name.substr(5)), std::nullopt};
    if (scheme.empty()) return FileName{std::string(name), std::nullopt};
    return fail(Errc::unsupported, "",
                fmt::format("\"{}\" names something by the scheme \"{}:\", which is not supported; a file of that name "
                            "is written \"./{}\"",
                            name, scheme, name));
}

}  // namespace

Result<FileName> parse_file_name(std::string_view name) {
    // Also bounds how deeply a description can be nested.
    if (name.size() > max_bytes) {
        return fail(Errc::unsupported, "",
                    fmt::format("a file name of {} bytes; at most {} are supported", name.size(), max_bytes));
    }
    auto result = TRY(parse_local_name(name));
    if (result.path.empty()) return fail(Errc::corrupt, "", "an empty file name");
    if (result.path.find('\0') != std::string::npos) return fail(Errc::corrupt, "", "a file name with a zero byte");
    return result;
}

bool is_description(std::string_view name) { return scheme_of(name) == "json"; }

std::string resolve(std::string_view path, std::string_view from) {
    // Not normalised: "a/../b" is not "b" where a is a symbolic link.
    return (std::filesystem::path(from).parent_path() / std::filesystem::path(path)).string();
}

}  // namespace qcow::format
