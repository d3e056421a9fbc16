#pragma once
// The command-line options of new images.

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "command.h"
#include "qcow/create.h"

namespace tool {

/// The values of -o, -b and -F.
struct NewImageArguments {
    std::vector<std::string> options;  // "name=value,name=value"; ",," stands for a comma in a value
    std::string backing;
    std::string backing_format;
};

/// The options of -o about encryption. `secret` members are ids.
struct EncryptionArguments {
    std::string key_secret;
    qcow::EncryptionOptions options;
    bool active = true;  // of amend, as all that follow
    std::string new_secret;
    std::string old_secret;
    std::optional<unsigned> key_slot;
};

/// The parsed options.
struct NewImageOptions : qcow::CreateOptions {
    EncryptionArguments encrypt;
    std::vector<std::string> given;  // the names of all that were given

    [[nodiscard]] bool has(std::string_view name) const { return std::ranges::find(given, name) != given.end(); }
};

/// Splits `text` at commas. Two commas stand for one comma in a part.
std::vector<std::string> parts_of(std::string_view text);

/// Adds -o to a command that makes images. `new_image_help` belongs into its help.
void add_new_image_options(CLI::App& app, NewImageArguments& arguments);

/// Adds -o, with another description, or an option with another name.
CLI::Option* add_options_option(CLI::App& app, std::vector<std::string>& options, const std::string& description,
                                const std::string& name = "-o,--options");

/// Adds the option `name` for the format of the backing file.
void add_backing_format_option(CLI::App& app, const std::string& name, NewImageArguments& arguments);

/// The help text of -o.
extern const char* const new_image_help;

/// Parses the values of -o. Errors: Errc::invalid_argument, with the wrong option and its possible values.
qcow::Result<NewImageOptions> parse_options(const std::vector<std::string>& options);

/// Parses all arguments. `format` is the format of the new image. Errors: those of parse_options, and a format of a
/// backing file without its name.
qcow::Result<NewImageOptions> parse_create_options(const NewImageArguments& arguments, qcow::Format format);

/// The same, with the key of the new image if it is encrypted. `path` names it.
qcow::Result<NewImageOptions> parse_create_options(const NewImageArguments& arguments, qcow::Format format,
                                                   const std::string& path);

}  // namespace tool
