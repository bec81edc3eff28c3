#include "signature.h"

#include <cctype>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

const char* name_of(Type type) {
    switch (type) {
        case Type::float32: return "float32";
        case Type::float64: return "float64";
        case Type::bfloat16: return "bfloat16";
        case Type::float16: return "float16";
        case Type::int32: return "int32";
        case Type::int64: return "int64";
        case Type::uint8: return "uint8";
        case Type::boolean: return "bool";
        default: return "another dtype";
    }
}

// One past the last byte of a tensor, from its first.
int64_t extent(const Tensor& tensor) {
    if (tensor.is_empty()) return 0;
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.ndim; ++i) last += (tensor.size[i] - 1) * tensor.stride[i];
    return (last + 1) * tensor.item_size;
}

// Without numbers it is, whatever its strides, as torch says.
bool is_packed(const Tensor& tensor, bool wholly) {
    if (tensor.is_empty()) return true;
    int64_t expected = 1;
    for (int64_t i = tensor.ndim - 1; i >= (wholly ? 0 : tensor.ndim - 1); --i) {
        if (tensor.size[i] > 1 && tensor.stride[i] != expected) return false;
        expected *= tensor.size[i];
    }
    return true;
}

// Whether two indices may name one number.
bool overlaps_itself(const Tensor& tensor) {
    if (tensor.is_empty()) return false;
    int64_t below = 1;  // what the dimensions further right span
    for (int64_t i = tensor.ndim - 1; i >= 0; --i) {
        if (tensor.size[i] <= 1) continue;
        if (tensor.stride[i] < below) return true;
        below = tensor.stride[i] * tensor.size[i];
    }
    return false;
}

bool overlap(const Tensor& a, const Tensor& b) {
    const char *first = static_cast<char*>(a.data), *second = static_cast<char*>(b.data);
    return first < second + extent(b) && second < first + extent(a);
}

std::string shape_of(const Tensor& tensor) {
    std::string text = "[";
    for (int64_t i = 0; i < tensor.ndim; ++i) text += (i ? ", " : "") + std::to_string(tensor.size[i]);
    return text + "]";
}

constexpr int64_t unknown = -1;

int64_t known(const Signature::Sizes& sizes, const std::string& name) {
    for (const auto& [letter, size] : sizes)
        if (letter == name) return size;
    return unknown;
}

// The types that A, T and M stand for in a call.
struct Types {
    Type A = Type::none, T = Type::none, M = Type::none;

    bool agrees(const std::string& word, Type type) {
        if (word == "any") return true;
        if (word == "A") return (type == Type::float32 || type == Type::float64) && is(A, type) && fits();
        if (word == "T")
            return (type == Type::float32 || type == Type::float64 || type == Type::bfloat16) && is(T, type) && fits();
        if (word == "M") return (type == Type::bfloat16 || is_sum(type)) && is(M, type);
        if (word == "F") return type == Type::float32 || type == Type::bfloat16 || type == Type::float16;
        const std::pair<const char*, Type> exact[] = {
            {"f32", Type::float32}, {"f64", Type::float64}, {"bf16", Type::bfloat16},
            {"i32", Type::int32},   {"i64", Type::int64},   {"u8", Type::uint8},
            {"bool", Type::boolean}};
        for (const auto& [name, meant] : exact)
            if (word == name) return type == meant;
        throw std::logic_error("no type is called " + word);
    }

    std::string words(const std::string& word) const {
        const auto known = [](Type type, const char* otherwise) {
            return std::string(type == Type::none ? otherwise : name_of(type));
        };
        if (word == "A") return known(A, "float32 or float64");
        if (word == "T") return known(T, A == Type::float64 ? "float64" : "float32 or bfloat16");
        if (word == "M") return known(M, A == Type::float64 ? "float64" : "float32 or bfloat16");
        if (word == "F") return "float32, bfloat16 or float16";
        const std::pair<const char*, const char*> exact[] = {{"f32", "float32"}, {"f64", "float64"},
                                                             {"bf16", "bfloat16"}, {"i32", "int32"},
                                                             {"i64", "int64"}, {"u8", "uint8"}};
        for (const auto& [name, meant] : exact)
            if (word == name) return meant;
        return word;
    }

private:
    static bool is(Type& bound, Type type) {
        if (bound == Type::none) bound = type;
        return bound == type;
    }
    bool is_sum(Type type) { return type == Type::float32 || type == Type::float64 ? is(A, type) && fits() : false; }
    bool fits() const {
        return A == Type::none || T == Type::none || (A == Type::float64) == (T == Type::float64);
    }
};

}  // namespace

Signature::Size::Size(const std::string& words_)
    : words(words_), factors(split(words.substr(0, words.find('+')), '*')) {
    if (const size_t plus = words.find('+'); plus != std::string::npos) more = std::stoll(words.substr(plus + 1));
}

// Unknown, too, where no tensor is so large.
int64_t Signature::Size::in(const Sizes& sizes) const {
    constexpr int64_t most = std::numeric_limits<int64_t>::max();
    int64_t product = 1;
    for (const std::string& factor : factors) {
        const int64_t size = std::isdigit(factor[0]) ? std::stoll(factor) : known(sizes, factor);
        if (size == unknown || (size > 0 && product > most / size)) return unknown;
        product *= size;
    }
    return product > most - more ? unknown : product + more;
}

// Whether a size is this one; a letter that is not known yet becomes it.
bool Signature::Size::agrees(int64_t size, Sizes& sizes) const {
    if (const int64_t expected = in(sizes); expected != unknown) return size == expected;
    if (factors.size() > 1 || known(sizes, factors[0]) != unknown || size < more) return false;
    sizes.emplace_back(factors[0], size - more);
    return true;
}

bool Signature::Operand::agrees(const Tensor& tensor, Sizes& sizes) const {
    for (const Shape& shape : shapes) {
        Sizes found = sizes;
        bool fits = int64_t(shape.size()) == tensor.ndim;
        for (int64_t i = 0; fits && i < tensor.ndim; ++i) fits = shape[i].agrees(tensor.size[i], found);
        if (!fits) continue;
        sizes = std::move(found);
        return true;
    }
    return false;
}

std::string Signature::Operand::expected(const Sizes& sizes) const {
    std::string text;
    for (const Shape& shape : shapes) {
        text += text.empty() ? "[" : " or [";
        for (size_t i = 0; i < shape.size(); ++i) {
            const int64_t size = std::isdigit(shape[i].words[0]) ? unknown : shape[i].in(sizes);
            text += (i ? ", " : "") + shape[i].words + (size == unknown ? "" : "=" + std::to_string(size));
        }
        text += "]";
    }
    return text;
}

Signature::Signature(const char* name, const char* words, Memory memory_) : operator_name(name), memory(memory_) {
    std::istringstream stream(words);
    for (std::string word; stream >> word;) {
        if (word == "streams") {
            has_streams = true;
            continue;
        }
        if (word[0] == '#') {
            integers.push_back(word.substr(1));
            continue;
        }
        Operand operand{};
        operand.is_result = word[0] == '>';
        operand.may_be_none = word.back() == '?';
        const size_t colon = word.find(':'), open = word.find('['), close = word.find(']');
        operand.name = word.substr(operand.is_result, colon - operand.is_result);
        operand.is_packed = word[open - 1] == '!';
        operand.type = word.substr(colon + 1, open - operand.is_packed - colon - 1);
        for (const std::string& shape : split(word.substr(open + 1, close - open - 1), '|')) {
            operand.shapes.emplace_back();
            for (const std::string& size : split(shape, ',')) operand.shapes.back().emplace_back(size);
        }
        operands.push_back(operand);
    }
}

void Signature::check(const Arguments& arguments, Sizes sizes) const {
    const auto refuse = [&](const std::string& argument, const std::string& expected, const std::string& got) {
        throw std::invalid_argument(operator_name + ": " + argument + " must be " + expected + ", got " + got);
    };
    const auto& tensors = arguments.tensors;
    if (tensors.size() != operands.size())
        refuse("its tensors", std::to_string(operands.size()) + " in all", std::to_string(tensors.size()));
    for (size_t i = 0; i < integers.size(); ++i) {
        if (arguments.integers.at(i) < 0) refuse(integers[i], "0 or more", std::to_string(arguments.integers[i]));
        sizes.emplace_back(integers[i], arguments.integers[i]);
    }
    if (has_streams) {
        if (arguments.widths.empty()) refuse("d_streams", "widths of at least one stream", "none");
        int64_t sum = 0;
        for (const int64_t width : arguments.widths) {
            if (width < 1) refuse("d_streams", "widths of at least 1", std::to_string(width));
            if (width > std::numeric_limits<int64_t>::max() - sum)
                refuse("d_streams", "widths with a sum below 2^63", std::to_string(width) + " among them");
            sum += width;
        }
        sizes.emplace_back("S", arguments.widths.size());
        sizes.emplace_back("D", sum);
    }
    const Operand* first = nullptr;
    int64_t device = 0;
    Types types;
    for (size_t i = 0; i < operands.size(); ++i) {
        const Operand& operand = operands[i];
        const Tensor& tensor = tensors[i];
        if (tensor.type == Type::none) {
            if (!operand.may_be_none) refuse(operand.name, "a tensor", "None");
            continue;
        }
        const auto got = [&] { return std::string(name_of(tensor.type)) + " " + shape_of(tensor); };
        if (tensor.ndim > 3 || tensor.memory != memory)
            refuse(operand.name, memory == Memory::cpu ? "a dense tensor on the CPU" : "a dense tensor on a GPU", "another");
        if (!first) first = &operand, device = tensor.device;
        if (tensor.device != device)
            refuse(
                operand.name, "on GPU " + std::to_string(device) + " as " + first->name + " is",
                "one on GPU " + std::to_string(tensor.device));
        if (!types.agrees(operand.type, tensor.type)) refuse(operand.name, types.words(operand.type), got());
        if (!operand.agrees(tensor, sizes)) refuse(operand.name, operand.expected(sizes), got());
        if (!is_packed(tensor, operand.is_packed))
            refuse(operand.name, operand.is_packed ? "contiguous" : "contiguous in its last dimension", "strides");
        if (operand.is_result && overlaps_itself(tensor)) refuse(operand.name, "memory of its own", "overlapping rows");
    }
    for (size_t i = 0; i < operands.size(); ++i) {
        for (size_t j = 0; operands[i].is_result && j < operands.size(); ++j) {
            if (i != j && tensors[i].data && tensors[j].data && overlap(tensors[i], tensors[j]))
                refuse(operands[i].name, "memory of its own", "that of " + operands[j].name);
        }
    }
    const int64_t S = arguments.widths.size();
    if (arguments.weights >= 0 && arguments.weights != S * S)
        refuse("weights", std::to_string(S * S) + " factors", std::to_string(arguments.weights));
}
