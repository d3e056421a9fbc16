#pragma once
// The command-line options of new images.

#include <string>
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

/// The parsed options.
struct NewImageOptions : qcow::CreateOptions {
    bool has_size = false;  // -o size was given
};

/// Adds -o to a command that makes images. `new_image_help` belongs into its help.
void add_new_image_options(CLI::App& app, NewImageArguments& arguments);

/// Adds the option `name` for the format of the backing file.
void add_backing_format_option(CLI::App& app, const std::string& name, NewImageArguments& arguments);

/// The help text of -o.
extern const char* const new_image_help;

/// Parses the arguments. Errors: Errc::invalid_argument, with the wrong option and its possible values.
qcow::Result<NewImageOptions> parse_create_options(const NewImageArguments& arguments);

}  // namespace tool
