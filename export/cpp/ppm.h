// A picture as a frame: binary PPM (P6, 8 bits per channel, RGB), which needs no decoding library.

#pragma once

#include <cstdint>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

struct Image {
  int64_t height = 0;
  int64_t width = 0;
  std::vector<uint8_t> pixels;  // height x width x 3, RGB
};

// The next number of a PPM header; comments run from # to the end of the line.
inline int64_t header_number(std::istream& in, const std::string& path) {
  while (in >> std::ws && in.peek() == '#') {
    in.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  int64_t value = 0;
  if (!(in >> value) || value <= 0 || value > 65535) {
    throw std::runtime_error(path + ": damaged PPM header");
  }
  return value;
}

inline Image read_ppm(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    throw std::runtime_error(path + ": cannot be opened");
  }
  char magic[2] = {};
  in.read(magic, 2);
  if (magic[0] != 'P' || magic[1] != '6') {
    throw std::runtime_error(path + ": not a binary PPM (P6); convert it, see the README beside this file");
  }
  Image image;
  image.width = header_number(in, path);
  image.height = header_number(in, path);
  if (header_number(in, path) != 255) {
    throw std::runtime_error(path + ": expected 8 bits per channel (maximum 255)");
  }
  in.get();  // one white space before the pixels
  image.pixels.resize(static_cast<size_t>(image.height * image.width * 3));
  in.read(reinterpret_cast<char*>(image.pixels.data()), static_cast<std::streamsize>(image.pixels.size()));
  if (static_cast<size_t>(in.gcount()) != image.pixels.size()) {
    throw std::runtime_error(path + ": the file ends before its pixels do");
  }
  return image;
}
